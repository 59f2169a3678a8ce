"""How sure the mean of per-image scores is."""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from visar.errors import VisarError


class Interval(NamedTuple):
    """A mean and the interval that should hold the true one at the asked level."""

    mean: float
    low: float
    high: float


def mean_interval(scores: Tensor, level: float = 0.95, resamples: int = 0, seed: int = 0) -> Interval:
    """The mean of independent scores [n] with its interval.

    Normal by default, which the central limit theorem allows from some dozens of images on. With `resamples`, the
    percentiles of so many bootstrapped means (Efron 1979). No such interval is given for Frechet distances: they are
    biased in n, and a bootstrap repeats images, which adds to the bias.
    """
    x = scores.double().flatten()
    if len(x) < 2:
        raise VisarError(f"An interval needs 2 or more scores, not {len(x)}.")
    if not 0 < level < 1:
        raise VisarError(f"The level of an interval lies between 0 and 1, not at {level}.")
    mean = float(x.mean())
    if resamples:
        generator = torch.Generator().manual_seed(seed)
        means = torch.stack([x[torch.randint(len(x), (len(x),), generator=generator)].mean() for _ in range(resamples)])
        low, high = means.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
        return Interval(mean, low, high)
    half = NormalDist().inv_cdf((1 + level) / 2) * float(x.std()) / len(x) ** 0.5
    return Interval(mean, mean - half, mean + half)
