"""Maximum mean discrepancies (Gretton et al. 2012): KID with a cubic kernel, CMMD with a Gaussian one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from visar.errors import VisarError

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
_ROWS = 1024  # of a kernel matrix at once


class Kid(NamedTuple):
    """The mean over subsets, and the standard deviation between them."""

    mean: float
    std: float


def kid(x: Tensor, y: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> Kid:
    """Kernel Inception distance (Binkowski et al. 2018, arXiv:1801.01401) of features [n, D] and [m, D].

    MMD^2 without bias, of the kernel (x.y / D + 1)^3, over random subsets; it may come out below 0. Subsets are sampled
    as in torch-fidelity, so both give one number for one seed.
    """
    _check(x, y)
    if min(len(x), len(y)) < subset_size or subset_size < 2:
        raise VisarError(
            f"KID's subsets of {subset_size} need as many images on both sides, and there are {len(x)} and {len(y)}."
        )
    rng = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        a, b = (z[rng.choice(len(z), subset_size, replace=False)].double() for z in (x, y))
        aa, bb, ab = _cubic(a, a), _cubic(b, b), _cubic(a, b)
        pairs = subset_size * (subset_size - 1)
        found.append((aa.sum() - aa.trace() + bb.sum() - bb.trace()) / pairs - 2 * ab.mean())
    values = torch.stack(found)
    return Kid(float(values.mean()), float(values.std(correction=0)))


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def cmmd(x: Tensor, y: Tensor) -> float:
    """CLIP-MMD (Jayasumana et al. 2024, arXiv:2401.09603) of unit features [n, D] and [m, D].

    1000 MMD^2 of the kernel exp(-|x - y|^2 / (2 10^2)) with every pair counted, an image with itself too: that is the
    published estimator, whose bias is about 1000 (1 - E k) (1/n + 1/m).
    """
    _check(x, y)
    x, y = x.double(), y.double()
    return CMMD_SCALE * (_mean_kernel(x, x) + _mean_kernel(y, y) - 2 * _mean_kernel(x, y))


def _mean_kernel(x: Tensor, y: Tensor) -> float:
    total = sum(float(torch.exp(-torch.cdist(rows, y).square() / (2 * CMMD_SIGMA**2)).sum()) for rows in x.split(_ROWS))
    return total / (len(x) * len(y))


def _check(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not len(x) or not len(y):
        raise VisarError(f"Features [n, D] and [m, D] are compared, not {[*x.shape]} and {[*y.shape]}.")
