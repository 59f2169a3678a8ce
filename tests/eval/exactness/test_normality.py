"""The statistics of the proof for continuous tokens: right about what is right, and not blind to what is wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from visar.eval.exactness.joint import EXACT_LIMIT, MUTANT_LIMIT
from visar.eval.exactness.normality import divergence, normality_z, upper_z, worst


def normals(n: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(n, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_z_of_standard_normals_is_about_standard_normal() -> None:
    z = np.array([normality_z(normals(4096, 12, seed), 2) for seed in range(100)])
    assert abs(z.mean()) < 0.35 and 0.8 < z.std() < 1.25 and abs(z).max() < EXACT_LIMIT


def changed(x: Tensor, kind: str, size: float) -> Tensor:
    """Rows that are no longer independent standard normals, in one way."""
    y = x.clone()
    if kind == "mean":
        y[:, 3] += size
    elif kind == "correlation":
        y[:, 5] = math.sqrt(1 - size**2) * x[:, 5] + size * x[:, 0]
    elif kind == "width":  # of one number, by another: neither has other marginals of note, and they do not correlate
        y[:, 5] = x[:, 5] * (1 + size * x[:, 0]) / math.sqrt(1 + size**2)
    elif kind == "neighbours":
        y[1:, 2] = math.sqrt(1 - size**2) * x[1:, 2] + size * x[:-1, 2]
    elif kind == "shape":  # the right mean and covariance
        y[:, 1] = torch.sign(x[:, 1]) * ((1 - size) * x[:, 1].abs() + size)
        y[:, 1] /= y[:, 1].std()
    return y


@pytest.mark.parametrize("kind", ["mean", "correlation", "width", "neighbours", "shape"])
def test_z_sees_what_is_wrong(kind: str) -> None:
    z = np.array([normality_z(changed(normals(16384, 12, seed), kind, 0.06), 2) for seed in range(5)])
    assert z.mean() > EXACT_LIMIT and z.min() > 3
    assert normality_z(changed(normals(65536, 12, 9), kind, 0.1), 2) > MUTANT_LIMIT


def test_figures_by_hand() -> None:
    assert upper_z(math.log(0.5)) == pytest.approx(0, abs=1e-9)
    assert upper_z(math.log(2.866515719235352e-07)) == pytest.approx(5, abs=1e-6)
    assert worst(torch.tensor([math.log(0.1), math.log(0.7)], dtype=torch.float64)) == pytest.approx(
        upper_z(math.log(1 - 0.9**2)), abs=1e-9
    )
    assert worst(torch.tensor([-1e5, -3.0], dtype=torch.float64)) == pytest.approx(447.2, abs=0.1)
    assert normality_z(torch.full((8, 2), math.nan, dtype=torch.float64), 2) == math.inf
    assert divergence(normals(65536, 4)) == pytest.approx(0, abs=3e-4)
    assert divergence(normals(65536, 4) + 0.5) == pytest.approx(0.5, abs=0.02)
