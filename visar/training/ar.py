"""Training the text-conditional GPT of LlamaGen on the tokens of captioned images."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visar.engine.memory import check_training
from visar.errors import VisarError
from visar.families.llamagen.gpt import Block, LlamaGen, initialise
from visar.families.llamagen.randar import RandAR
from visar.families.llamagen.vq import VQModel
from visar.text_encoders.words import WordEncoder
from visar.training.data import SPLITS, ImageSet, Record, spread, to_unit
from visar.training.loop import STATE, TrainConfig, check_parts, distributed, fit, step_seed
from visar.training.phrases import typed
from visar.training.variants import VariantTokens


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
        features = self.dropped(features, drop)
        if own is not None:
            b = len(own)
            drawn = draw(self.gpt(features[:b], inputs[:b, :-1], mask[:b]), own)
            inputs = torch.cat([torch.where(own > 0, drawn, tokens[:b]), inputs[b:]])
        logits = self.gpt(features, inputs[:, :-1], mask)
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    def dropped(self, features: Tensor, drop: Tensor) -> Tensor:
        return torch.where(drop[:, None, None], self.gpt.cls_embedding.null_like(features), features)


class AnyOrderLoss(ARLoss):
    """The same for a RandAR, each image in an order of its own: `cells` [B, n], of each row a permutation of all."""

    def forward(  # type: ignore[override]
        self, features: Tensor, mask: Tensor, drop: Tensor, inputs: Tensor, tokens: Tensor, cells: Tensor
    ) -> Tensor:
        logits = self.gpt(self.dropped(features, drop), inputs.gather(1, cells)[:, :-1], mask, cells)
        return F.cross_entropy(logits.flatten(0, 1), tokens.gather(1, cells).flatten())


def random_cells(tokens: Tensor, g: torch.Generator) -> Tensor:
    """Orders of tokens [B, n] for `AnyOrderLoss`."""
    return torch.rand(tokens.shape, generator=g).argsort(1)


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


def encode_captions(
    encoder: WordEncoder,
    records: list[Record],
    rng: random.Random | None,
    say: Callable[[Record, random.Random], str] = Record.prompt,
) -> tuple[Tensor, Tensor]:
    """Features and mask of the records' prompts, which `say` varies with a generator.

    Where the varied one has no known word, it is the plain one.
    """
    varied = [say(r, rng) if rng else r.prompt() for r in records]
    return encoder.encode([p if encoder.ids(p)[0] else r.prompt() for p, r in zip(varied, records, strict=True)])


@torch.inference_mode()
def cross_entropy(gpt: LlamaGen, encoder: WordEncoder, records: list[Record], tokens: Tensor, batch: int = 64) -> float:
    """Mean next-token cross-entropy in nats under the plain prompts of the records; of a RandAR in random orders."""
    any_order, total, g = gpt.scan == "any", 0.0, torch.Generator().manual_seed(0)
    loss = (AnyOrderLoss if any_order else ARLoss)(gpt)
    for start in range(0, len(records), batch):
        part = records[start : start + batch]
        features, mask = encode_captions(encoder, part, None)
        drop = torch.zeros(len(part), dtype=torch.bool)
        ids = tokens[start : start + batch]
        order = [random_cells(ids, g)] if any_order else []
        total += loss(*(t.to(gpt.device) for t in (features, mask, drop, ids, ids, *order))).item() * len(part)
    return total / len(records)


def bigram_cross_entropy(train: Tensor, held: Tensor, vocab: int) -> float:
    """The baseline: next token given the left one, counts of the training tokens with add-0.1 smoothing; nats."""
    counts = torch.full((vocab, vocab), 0.1)
    counts.index_put_((train[:, :-1].flatten(), train[:, 1:].flatten()), torch.ones(1), accumulate=True)
    log_p = (counts / counts.sum(1, keepdim=True)).log()
    return -log_p[held[:, :-1].flatten(), held[:, 1:].flatten()].mean().item()


class TokenBatches:
    """What a GPT learns of an image set: captions with tokens by step, and its cross-entropy on images of each split.

    With `variants`, as many of each image are learnt (`visar.training.variants`) and prompts are as people type them.
    `light` corruption is of few inputs; without it, heavy corruption and the model's own mistakes keep an image with
    one token string from being learnt by heart. `weights` says how often images of a style or group are taken, 1 being
    normal. With `any_order` there are orders for `AnyOrderLoss` in place of the model's mistakes. `taught` is the text
    encoder with the list of what is known. Raises `VisarError` for a size or weights that cannot be.
    """

    def __init__(
        self,
        data: ImageSet,
        size: int,
        config: TrainConfig,
        vq: VQModel,
        encoder: WordEncoder,
        *,
        dropped: float = 0.1,
        variants: int = 0,
        weights: Mapping[str, float] | None = None,
        light: bool = False,
        any_order: bool = False,
    ):
        if size % vq.sizes.downsample:
            raise VisarError(f"The size must be a multiple of {vq.sizes.downsample} pixels, not {size}.")
        shares = data.shares(weights or {})
        check_parts(config.out, STATE, "gpt", "text_encoder")
        self.data, self.config, self.encoder, self.light = data, config, encoder, light
        self.dropped, self.variants, self.any_order = dropped, variants, any_order
        rank, _, device = distributed(config.device)
        file = config.out / f"variants-{rank}.safetensors" if variants else None
        config.out.mkdir(parents=True, exist_ok=True)
        self.tokens = VariantTokens(vq.to(device), data, size, max(variants, 1), file, config.seed)
        split = {name: data.indices(name) for name in SPLITS}
        self.train = split["train"]
        self.reach = list(accumulate(shares[i] for i in self.train))
        some = spread(self.train, 512)  # of these are the tokens that corrupt, and those of the bigram
        self.plain = self.tokens(some, [0] * len(some))
        self.taught = encoder.knowing(data.known())
        self.watched = {name: spread(rows) for name, rows in split.items() if rows}
        self.held = {name: self.tokens(rows, [0] * len(rows)) for name, rows in self.watched.items()}
        self.bigram = {
            f"bigram-{name}": round(bigram_cross_entropy(self.plain, ids, vq.sizes.codebook_size), 3)
            for name, ids in self.held.items()
            if name != "train"
        }

    def __call__(self, step: int, rank: int) -> tuple[Tensor, ...]:
        """The arguments of `ARLoss` or `AnyOrderLoss` for a step of a process."""
        config, variants = self.config, self.variants
        rng = random.Random(step_seed(config.seed, step, rank))
        chosen = rng.choices(self.train, cum_weights=self.reach, k=config.batch)
        records = [self.data.records[i] for i in chosen]
        features, mask = encode_captions(self.encoder, records, rng, typed if variants else Record.prompt)
        drop = torch.tensor([rng.random() < self.dropped for _ in chosen])
        wanted = self.tokens(chosen, [rng.randrange(max(variants, 1)) for _ in chosen])
        g = torch.Generator().manual_seed(step_seed(config.seed, step, rank))
        if self.light or self.any_order:
            inputs = corrupt(wanted, self.plain, g, most=0.3, clean=0.4)
            order = [random_cells(wanted, g)] if self.any_order else []
            return features, mask, drop, inputs, wanted, *order
        own = own_mistakes(config.batch // 2, wanted.shape[1], g)
        return features, mask, drop, corrupt(wanted, self.plain, g), wanted, own

    def cross_entropy(self, gpt: LlamaGen) -> dict[str, float]:
        """Nats per token on images of each split."""
        return {
            name: round(cross_entropy(gpt, self.encoder, [self.data.records[i] for i in rows], self.held[name]), 4)
            for name, rows in self.watched.items()
        }

    def save(self, gpt: LlamaGen) -> None:
        """Save the GPT, and the text encoder next to it; complete at every moment."""
        if distributed()[0] == 0:
            gpt.save_pretrained(self.config.out / "gpt")
            self.taught.save_pretrained(self.config.out / "text_encoder")
        self.tokens.save()


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
    variants: int = 0,
    weights: Mapping[str, float] | None = None,
    start: LlamaGen | None = None,
    any_order: bool = False,
) -> LlamaGen:
    """Train on the `train` split; saves `gpt/` in diffusers layout in `config.out`; returns the EMA.

    `dropped`, `variants` and `weights` are those of `TokenBatches`. `start` is a GPT of these sizes, or with fewer
    layers, to go on from. With `any_order` it becomes a RandAR, for which `start` may be a plain GPT.
    """
    batches = TokenBatches(
        data, size, config, vq, encoder, dropped=dropped, variants=variants, weights=weights, light=variants > 0,
        any_order=any_order,
    )  # fmt: skip
    torch.manual_seed(config.seed)
    made = partial(
        RandAR if any_order else LlamaGen, vocab_size=vq.sizes.codebook_size, dim=dim, num_layers=layers,
        num_heads=heads, ffn=ffn, condition="text", condition_length=encoder.length,
        caption_features=encoder.table.shape[1], grid=size // vq.sizes.downsample,
    )  # fmt: skip
    fresh = check_training(made, config.device)
    model = (AnyOrderLoss if any_order else ARLoss)(initialise(fresh) if start is None else continued(start, fresh))

    def evaluate(ema: ARLoss) -> dict[str, float]:
        batches.save(ema.gpt)
        return batches.cross_entropy(ema.gpt) | batches.bigram

    return fit(model, batches, config, evaluate).gpt


def continued(start: LlamaGen, fresh: LlamaGen) -> LlamaGen:
    """`fresh` with the weights of `start`; layers that `start` lacks come last, and at first add nothing."""
    ours, theirs = fresh.config, start.config
    differing = [f"{k} {theirs[k]} instead of {ours[k]}" for k in ours if ours[k] != theirs[k] and k != "num_layers"]
    if type(start) not in (type(fresh), LlamaGen):
        what = "has two-way heads; `visar train two-way` trains them"
        if start.scan == "any":
            what = "samples in any order: --any-order goes on from a RandAR or a plain GPT"
        raise VisarError(f"The model to go on from {what}.")
    if differing or theirs.num_layers > ours.num_layers:
        wrong = differing or [f"{theirs.num_layers} layers, more than {ours.num_layers}"]
        raise VisarError(f"The model to go on from has other sizes: {', '.join(wrong)}.")
    initialise(fresh).load_state_dict(start.float().state_dict(), strict=False)
    for block in list(fresh.layers)[theirs.num_layers :]:
        assert isinstance(block, Block)
        nn.init.zeros_(block.attention.wo.weight)
        nn.init.zeros_(block.feed_forward.w2.weight)
    return fresh
