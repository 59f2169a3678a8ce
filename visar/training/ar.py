"""Training the text-conditional GPT of LlamaGen on the tokens of captioned pictures."""

from __future__ import annotations

import math
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visar.models.llamagen import LlamaGen
from visar.models.vq import VQModel
from visar.models.words import WordEncoder
from visar.training.data import SPLITS, PictureSet, Record, to_unit
from visar.training.loop import TrainConfig, distributed, fit, step_seed


class ARLoss(nn.Module):
    """Mean next-token cross-entropy in nats."""

    def __init__(self, gpt: LlamaGen):
        super().__init__()
        self.gpt = gpt

    def forward(self, features: Tensor, mask: Tensor, drop: Tensor, tokens: Tensor) -> Tensor:
        """`features` [B, T, C] and `mask` [B, T] of captions; `drop` [B] marks rows trained unconditionally."""
        features = torch.where(drop[:, None, None], self.gpt.cls_embedding.null_like(features), features)
        logits = self.gpt(features, tokens[:, :-1], mask)
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def initialise(gpt: LlamaGen) -> LlamaGen:
    """Normal(0, 0.02) weights, the ways back into the residual stream scaled down with depth."""
    for name, p in gpt.named_parameters():
        if p.ndim == 2:
            back = name.endswith(("wo.weight", "w2.weight"))
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * gpt.config.num_layers) if back else 0.02)
    return gpt


@torch.inference_mode()
def tokenize(vq: VQModel, pixels: Tensor, batch: int = 64) -> Tensor:
    """Ids [n, h*w] of uint8 pixels [n, 3, H, W]."""
    return torch.cat([vq.encode(to_unit(part.to(vq.device))).cpu() for part in pixels.split(batch)])


def encode_captions(encoder: WordEncoder, records: list[Record], rng: random.Random | None) -> tuple[Tensor, Tensor]:
    return encoder.encode([r.prompt(rng) for r in records])


@torch.inference_mode()
def cross_entropy(gpt: LlamaGen, encoder: WordEncoder, records: list[Record], tokens: Tensor, batch: int = 64) -> float:
    """Mean next-token cross-entropy in nats under the plain prompts of the records."""
    loss, total = ARLoss(gpt), 0.0
    for start in range(0, len(records), batch):
        part = records[start : start + batch]
        features, mask = encode_captions(encoder, part, None)
        drop = torch.zeros(len(part), dtype=torch.bool)
        rows = [t.to(gpt.device) for t in (features, mask, drop, tokens[start : start + batch])]
        total += loss(*rows).item() * len(part)
    return total / len(records)


def bigram_cross_entropy(train: Tensor, held: Tensor, vocab: int) -> float:
    """The baseline: next token given the left one, counts of the training tokens with add-0.1 smoothing; nats."""
    counts = torch.full((vocab, vocab), 0.1)
    counts.index_put_((train[:, :-1].flatten(), train[:, 1:].flatten()), torch.ones(1), accumulate=True)
    log_p = (counts / counts.sum(1, keepdim=True)).log()
    return -log_p[held[:, :-1].flatten(), held[:, 1:].flatten()].mean().item()


def train_ar(
    data: PictureSet,
    size: int,
    config: TrainConfig,
    vq: VQModel,
    encoder: WordEncoder,
    dim: int = 256,
    layers: int = 6,
    heads: int = 4,
    ffn: int = 768,
    dropped: float = 0.1,
) -> LlamaGen:
    """Train on the `train` split; saves `gpt/` in diffusers layout in `config.out`; returns the EMA."""
    torch.manual_seed(config.seed)
    tokens = tokenize(vq, data.pixels(size))
    split = {name: data.indices(name) for name in SPLITS}
    train = split["train"]
    gpt = LlamaGen(
        vocab_size=vq.sizes.codebook_size,
        dim=dim,
        num_layers=layers,
        num_heads=heads,
        ffn=ffn,
        condition="text",
        condition_length=encoder.length,
        caption_features=encoder.table.shape[1],
        grid=size // vq.sizes.downsample,
    )
    model = ARLoss(initialise(gpt))

    def batch_at(step: int, rank: int) -> tuple[Tensor, ...]:
        rng = random.Random(step_seed(config.seed, step, rank))
        chosen = [train[rng.randrange(len(train))] for _ in range(config.batch)]
        features, mask = encode_captions(encoder, [data.records[i] for i in chosen], rng)
        drop = torch.tensor([rng.random() < dropped for _ in chosen])
        return features, mask, drop, tokens[chosen]

    def evaluate(ema: nn.Module) -> dict[str, float]:
        parts = {name: rows[:256] for name, rows in split.items() if rows}
        return {
            name: round(cross_entropy(ema.gpt, encoder, [data.records[i] for i in rows], tokens[rows]), 4)
            for name, rows in parts.items()
        }

    ema = fit(model, batch_at, config, evaluate)
    if distributed()[0] == 0:
        ema.gpt.save_pretrained(config.out / "gpt")
    return ema.gpt
