"""Training the text-conditional GPT of LlamaGen on the tokens of captioned images."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visar.errors import VisarError
from visar.families.llamagen.gpt import LlamaGen, initialise
from visar.families.llamagen.vq import VQModel
from visar.text_encoders.words import WordEncoder
from visar.training.data import SPLITS, ImageSet, Record, to_unit
from visar.training.loop import TrainConfig, distributed, fit, step_seed


class ARLoss(nn.Module):
    """Mean next-token cross-entropy in nats."""

    def __init__(self, gpt: LlamaGen):
        super().__init__()
        self.gpt = gpt

    def forward(
        self, features: Tensor, mask: Tensor, drop: Tensor, inputs: Tensor, tokens: Tensor, own: Tensor | None = None
    ) -> Tensor:
        """Predict `tokens` [B, n] from `inputs` [B, n], which are the tokens, or a corrupted copy of them.

        `features` [B, T, C] and `mask` [B, T] are of the captions; `drop` [B] marks rows trained unconditionally.
        `own` [b, n] turns the inputs of the first b rows into tokens the model draws itself where it is above 0, and
        into the true tokens elsewhere: mistakes of the kind that decoding makes (scheduled sampling, Bengio et al.
        2015, arXiv:1506.03099, in two parallel passes). The values in (0, 1) are the coins of the draws.
        """
        features = torch.where(drop[:, None, None], self.gpt.cls_embedding.null_like(features), features)
        if own is not None:
            b = len(own)
            drawn = draw(self.gpt(features[:b], inputs[:b, :-1], mask[:b]), own)
            inputs = torch.cat([torch.where(own > 0, drawn, tokens[:b]), inputs[b:]])
        logits = self.gpt(features, inputs[:, :-1], mask)
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def draw(logits: Tensor, coins: Tensor) -> Tensor:
    """Ids [B, n] of softmax(logits [B, n, V]) by inversion with coins [B, n] in (0, 1)."""
    below = logits.detach().float().softmax(-1).cumsum(-1) < coins[..., None]
    return below.sum(-1).clamp(max=logits.shape[-1] - 1)


def own_mistakes(rows: int, length: int, g: torch.Generator, most: float = 1.0) -> Tensor:
    """Coins [rows, length] for `ARLoss`: in (0, 1) at a rate uniform in [0, `most`] per row, and 0 elsewhere."""
    coins = torch.rand(rows, length, generator=g).clamp(1e-6, 1 - 1e-6)
    return coins * (torch.rand(rows, length, generator=g) < torch.rand(rows, 1, generator=g) * most)


def corrupt(tokens: Tensor, pool: Tensor, g: torch.Generator, most: float = 1.0, clean: float = 0.15) -> Tensor:
    """A copy of tokens [B, n] with some replaced by what other images of `pool` [m, n] have at that position.

    The rate is uniform in [0, `most`] per row, and 0 for a share `clean` of rows. A small set is otherwise learnt by
    heart from the first tokens of each image, and the caption ignored; it also teaches to go on from a wrong token.
    """
    rate = torch.rand(len(tokens), 1, generator=g) * most
    rate[torch.rand(len(tokens), generator=g) < clean] = 0
    other = pool[torch.randint(len(pool), tokens.shape, generator=g), torch.arange(tokens.shape[1])]
    return torch.where(torch.rand(tokens.shape, generator=g) < rate, other, tokens)


@torch.inference_mode()
def tokenize(vq: VQModel, pixels: Tensor, batch: int = 64) -> Tensor:
    """Ids [n, h*w] of uint8 pixels [n, 3, H, W]."""
    return torch.cat([vq.encode(to_unit(part.to(vq.device))).cpu() for part in pixels.split(batch)])


def encode_captions(encoder: WordEncoder, records: list[Record], rng: random.Random | None) -> tuple[Tensor, Tensor]:
    """Features and mask of the records' prompts; the plain one where the varied one has no known word."""
    varied = [r.prompt(rng) for r in records]
    return encoder.encode([p if encoder.ids(p)[0] else r.prompt() for p, r in zip(varied, records, strict=True)])


@torch.inference_mode()
def cross_entropy(gpt: LlamaGen, encoder: WordEncoder, records: list[Record], tokens: Tensor, batch: int = 64) -> float:
    """Mean next-token cross-entropy in nats under the plain prompts of the records."""
    loss, total = ARLoss(gpt), 0.0
    for start in range(0, len(records), batch):
        part = records[start : start + batch]
        features, mask = encode_captions(encoder, part, None)
        drop = torch.zeros(len(part), dtype=torch.bool)
        ids = tokens[start : start + batch]
        rows = [t.to(gpt.device) for t in (features, mask, drop, ids, ids)]
        total += loss(*rows).item() * len(part)
    return total / len(records)


def bigram_cross_entropy(train: Tensor, held: Tensor, vocab: int) -> float:
    """The baseline: next token given the left one, counts of the training tokens with add-0.1 smoothing; nats."""
    counts = torch.full((vocab, vocab), 0.1)
    counts.index_put_((train[:, :-1].flatten(), train[:, 1:].flatten()), torch.ones(1), accumulate=True)
    log_p = (counts / counts.sum(1, keepdim=True)).log()
    return -log_p[held[:, :-1].flatten(), held[:, 1:].flatten()].mean().item()


def train_ar(
    data: ImageSet,
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
    if size % vq.sizes.downsample:
        raise VisarError(f"The size must be a multiple of {vq.sizes.downsample} pixels, not {size}.")
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
        g = torch.Generator().manual_seed(step_seed(config.seed, step, rank))
        inputs = corrupt(tokens[chosen], tokens[train], g)
        own = own_mistakes(config.batch // 2, tokens.shape[1], g)
        return features, mask, drop, inputs, tokens[chosen], own

    def evaluate(ema: ARLoss) -> dict[str, float]:
        parts = {name: rows[:256] for name, rows in split.items() if rows}
        return {
            name: round(cross_entropy(ema.gpt, encoder, [data.records[i] for i in rows], tokens[rows]), 4)
            for name, rows in parts.items()
        }

    ema = fit(model, batch_at, config, evaluate)
    if distributed()[0] == 0:
        ema.gpt.save_pretrained(config.out / "gpt")
    return ema.gpt
