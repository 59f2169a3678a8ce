"""Models that sample in any order, tiny, and the distribution of their images in an order."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visar.engine.guidance import Guidance
from visar.engine.layout import Layout
from visar.engine.loop import decode
from visar.engine.rng import Noise
from visar.eval.exactness.joint import chi_square_z, values
from visar.eval.exactness.tabular import Settings, reference_probs
from visar.families.llamagen.lpd import LPD
from visar.families.llamagen.lpd_session import LPDSession
from visar.families.llamagen.randar import RandAR
from visar.families.llamagen.randar_session import AnyOrderSession, RandARSession
from visar.samplers import Target

GRID, LENGTH, VOCAB = 4, 16, 24
SIZES: dict[str, Any] = dict(vocab_size=VOCAB, dim=32, num_layers=2, num_heads=2, ffn=48, classes=7)
CLASSES = torch.tensor([0, 3, 6])
CELLS = torch.stack([torch.randperm(LENGTH, generator=torch.Generator().manual_seed(i)) for i in range(3)])
IDS = torch.randint(VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(8))
ORDER, FORCED, IMAGES = (2, 1, 3, 0), (-1, 3, -1, -1), 4096
KINDS: dict[type[Any], type[AnyOrderSession]] = {RandAR: RandARSession, LPD: LPDSession}


@functools.cache
def gpt(kind: type[Any] = RandAR, grid: int = GRID, head: float = 0.2, **changes: Any) -> Any:
    """Weights that are large enough for every token, and every query, to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        model = kind(**SIZES | changes, grid=grid).eval().requires_grad_(False)
        for name, p in model.named_parameters():
            if name in ("pos_instruct_embeddings", "mask_token", "pos_embed"):
                torch.nn.init.normal_(p)
            elif p.ndim == 2:
                torch.nn.init.normal_(
                    p, std=head if "output" in name else (3 if kind is LPD else 1.5) * p.shape[-1] ** -0.5
                )
            elif kind is LPD:
                torch.nn.init.normal_(p, float("norm" in name and "weight" in name), 0.2)
        return model


def session(kind: type[Any], window: int, guidance: Guidance = Guidance()) -> Any:
    made = KINDS[kind](gpt(kind), CLASSES, CELLS, length=LENGTH, window=window, grid=GRID, guidance=guidance)
    made.layout = Layout(GRID, GRID)
    return made


def small(kind: type[Any]) -> Any:
    """A model of images of four tokens of four values."""
    return gpt(kind, 2, head=0.08 if kind is RandAR else 0.15, vocab_size=4)


@functools.cache
def expected(kind: type[Any]) -> np.ndarray:
    """The probability of every image, [2 classes, V**N], in raster order, for tokens sampled in `ORDER`.

    It comes from whole sequences without a cache.
    """
    images = torch.cartesian_prod(*[torch.arange(4)] * 4)
    settings = Settings(0.8, 0, 0.9, 2.0, forced=tuple(FORCED[cell] for cell in ORDER))
    cells = torch.tensor(ORDER).expand(len(images), -1)
    by_turn, out = images.gather(1, cells), np.ones((2, len(images)))
    for c in range(2):
        given = torch.full((len(images),), c)
        null = small(kind).cls_embedding.null_like(given)
        cond, uncond = (small(kind)(x, by_turn[:, :-1], None, cells).double().numpy() for x in (given, null))
        for i, image in enumerate(by_turn.tolist()):
            for n, token in enumerate(image):
                out[c, i] *= reference_probs(cond[i, n], uncond[i, n], n, settings)[token]
    return out


def sampled(kind: type[Any], sampler: Any, images: Tensor, wrong: type[Any] | None = None) -> Tensor:
    """The tokens [B, 4] of some images as one batch, by a session that may be `wrong`; the two classes take turns."""
    cells, window = torch.tensor(ORDER).expand(len(images), -1), max(sampler.window, 2)
    made = (wrong or KINDS[kind])(
        small(kind), images % 2, cells, length=4, window=window, grid=2, guidance=Guidance(2.0)
    )
    made.layout = Layout(2, 2)
    return decode(made, sampler, Target(0.8, 0, 0.9, torch.tensor(FORCED)), Noise(0, images)).tokens


def worst_z(kind: type[Any], tokens: Tensor) -> float:
    """The chi-square z of the images of either class."""
    counts = [np.bincount(values(tokens[c::2], 4), minlength=256) for c in range(2)]
    return max(abs(chi_square_z(n, p)) for n, p in zip(counts, expected(kind), strict=True))
