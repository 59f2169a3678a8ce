"""Whether a sampler changes the pictures: how far they lie from those of plain decoding, for the same prompts.

Distances are energy distances (Szekely and Rizzo 2013) between features, 2 E|x - y| - E|x - x'| - E|y - y'|, without
bias: 0 on average where the laws are one, whatever the number of pictures, so they may come out below it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visar.errors import VisarError
from visar.eval.extractors import Features, as_uint8
from visar.pipelines.base import ImagePipeline
from visar.samplers import CONTINUOUS, AnySampler, Autoregressive
from visar.training.data import PictureSet, to_unit

BATCH = 32
PROMPTS = 24


@dataclass(frozen=True)
class QualityRow:
    """`moved`: the energy distance to plain decoding under another seed, prompt by prompt; the mean over prompts.

    `error`: its standard error over prompts. `real`: the energy distance of all pictures to real ones, where there are
    any. `moved` of plain decoding itself (under a third seed) shows what chance does.
    """

    sampler: str
    moved: float
    error: float
    real: float | None


def energy(x: Tensor, y: Tensor) -> Tensor:
    """The energy distance [...] between sets of features x [..., n, D] and y [..., m, D], n and m 2 or more."""

    def within(z: Tensor) -> Tensor:
        count = z.shape[-2]
        return torch.cdist(z, z).sum((-2, -1)) / (count * (count - 1))

    return 2 * torch.cdist(x, y).mean((-2, -1)) - within(x) - within(y)


def real_pictures(data: PictureSet, size: int, seed: int = 0) -> tuple[list[str], Tensor]:
    """Prompts of training pictures that a seed chooses, and the pictures [n, 3, size, size] in [0, 1]."""
    train = data.indices("train")
    rows = random.Random(seed).sample(train, min(PROMPTS, len(train)))
    return [data.records[i].prompt() for i in rows], to_unit(data.pixels(size)[rows]) / 2 + 0.5


def quality(
    pipe: ImagePipeline,
    samplers: Mapping[str, AnySampler],
    conditions: Sequence[Any],
    extract: Features,
    *,
    each: int = 4,
    real: Tensor | None = None,
    seed: int = 0,
    **settings: Any,
) -> list[QualityRow]:
    """Draw `each` pictures of every condition with every sampler, and compare; the first row is plain decoding.

    For masked models, whose laws differ with the number of passes, that is the first sampler.
    `extract` sees them rounded to uint8, and its "pool" features are compared. `real` [n, 3, H, W] in [0, 1]: pictures
    of these conditions that no model made. `settings` go to the pipeline.
    """
    conditions = list(dict.fromkeys(conditions))  # one that stood twice would give the same pictures twice
    if each < 2 or len(conditions) < 2:
        raise VisarError("Distances need 2 or more pictures of 2 or more prompts.")

    def features_of(pictures: Tensor) -> Tensor:
        return extract(as_uint8(pictures))["pool"].double()

    def drawn(sampler: AnySampler, seed: int) -> Tensor:
        """Features [conditions, each, D]."""
        found, some = [], max(1, BATCH // each)
        for start in range(0, len(conditions), some):
            part = [c for c in conditions[start : start + some] for _ in range(each)]
            found.append(features_of(pipe(part, sampler=sampler, seed=seed, output_type="pt", **settings).images))
        return torch.cat(found).unflatten(0, (len(conditions), each))

    plain: AnySampler = next(iter(samplers.values())) if pipe.samplers is CONTINUOUS else Autoregressive()
    base = next(iter(samplers)) if pipe.samplers is CONTINUOUS else plain.name
    reference = drawn(plain, seed)
    shown = None if real is None else features_of(real)

    def row(name: str, sampler: AnySampler, seed: int) -> QualityRow:
        features = drawn(sampler, seed)
        moved = energy(features, reference)
        far = None if shown is None else energy(features.flatten(0, 1), shown).item()
        return QualityRow(name, moved.mean().item(), moved.std().item() / len(moved) ** 0.5, far)

    others = {name: sampler for name, sampler in samplers.items() if name != base}
    return [row(base, plain, seed + 2)] + [row(n, s, seed + 1) for n, s in others.items()]
