"""Couplings of Gaussian distributions: acceptance, residual and reflection against closed forms and integration."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from visar.eval.exactness.normality import log_p_uniform, normality_z
from visar.samplers.gaussian import (
    MOST_RELAXED_TRIALS,
    Gaussian,
    Trials,
    accepts,
    log_ratio,
    reflected,
    replaced,
    residual,
)

GRID = np.linspace(-12, 12, 48001)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(mean: float | Tensor, std: float | Tensor, n: int, d: int = 1) -> Gaussian:
    return Gaussian(*(torch.as_tensor(v, dtype=torch.float32).expand(n, d) for v in (mean, std)))


def samples(of: Gaussian, seed: int) -> Tensor:
    return of.sample(torch.randn(of.mean.shape, generator=generator(seed)))


def uniforms(n: int, seed: int) -> Tensor:
    return torch.rand(n, generator=generator(seed), dtype=torch.float64)


def trials(d: int, width: int = 16, seed: int = 5, counted: list[int] | None = None) -> Trials:
    g = generator(seed)

    def sample(block: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        if counted is not None:
            counted.append(len(rows))
        shape = (len(rows), width)
        return torch.randn(*shape, d, generator=g), torch.rand(shape, generator=g, dtype=torch.float64)

    return sample


def density(mean: float, std: float) -> np.ndarray:
    return np.exp(-0.5 * ((GRID - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))


def fits(x: Tensor, pdf: np.ndarray) -> bool:
    """Kolmogorov's test of x [n] against a density on the grid, at 0.1 %."""
    cdf = np.cumsum(pdf) * (GRID[1] - GRID[0])
    assert cdf[-1] == pytest.approx(1, abs=1e-4)
    u = torch.from_numpy(np.interp(x.double().numpy(), GRID, cdf))
    return float(log_p_uniform(u[:, None])) > math.log(1e-3)


def coupled(p: Gaussian, q: Gaussian, seed: int = 0, log_factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Drafts from q made samples from p, and which were kept."""
    y = samples(q, seed)
    kept = accepts(y, p, q, uniforms(len(y), seed + 1), 0.0 if log_factor is None else log_factor)
    lost = ~kept
    if log_factor is None:
        y[lost] = replaced(y[lost], p.at(lost), q.at(lost), trials(y.shape[1]))
    else:
        y[lost] = residual(p.at(lost), q.at(lost), trials(y.shape[1]), log_factor[lost])
    return y, kept


PAIRS = [((0.0, 1.0), (0.4, 1.2)), ((0.0, 1.0), (1.0, 1.0)), ((0.3, 1.1), (0.0, 0.9)), ((0.0, 0.7), (0.0, 1.4))]


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_change_of_measure(p: tuple[float, float], q: tuple[float, float]) -> None:
    n = 400_000
    one, other = gaussian(*p, n), gaussian(*q, n)
    ratio = log_ratio(samples(other, 1), one, other).exp()
    assert float(ratio.mean()) == pytest.approx(1, abs=5 * float(ratio.std()) / n**0.5)
    overlap = np.minimum(density(*p), density(*q)).sum() * (GRID[1] - GRID[0])  # 1 - TV
    assert float(ratio.clamp(max=1).mean()) == pytest.approx(overlap, abs=0.003)
    assert float(accepts(samples(other, 2), one, other, uniforms(n, 3)).double().mean()) == pytest.approx(
        overlap, abs=0.004
    )


@pytest.mark.parametrize("d", [1, 16])
@pytest.mark.parametrize("distance", [0.0, 0.1, 1.0, 3.0, 10.0])
def test_acceptance_distribution(d: int, distance: float) -> None:
    """2 Phi(-delta / 2 sigma) for equal covariances, delta over all numbers of the token."""
    n, sigma = 100_000, 0.0063
    away = torch.randn(d, generator=generator(9))
    p, q = gaussian(0.2, sigma, n, d), gaussian(0.2 + away / away.norm() * distance * sigma, sigma, n, d)
    kept = accepts(samples(q, 1), p, q, uniforms(n, 2)).double().mean()
    expected = 2 * float(torch.special.ndtr(torch.tensor(-distance / 2, dtype=torch.float64)))
    assert float(kept) == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / n) + 1e-6)
    assert distance or bool(kept == 1)


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_residual_distribution(p: tuple[float, float], q: tuple[float, float]) -> None:
    n = 50_000
    rest = np.maximum(density(*p) - density(*q), 0)
    rest /= rest.sum() * (GRID[1] - GRID[0])
    x = residual(gaussian(*p, n), gaussian(*q, n), trials(1))
    assert fits(x[:, 0], rest)
    assert not fits(samples(gaussian(*p, n), 1)[:, 0], rest)


def test_reflected_drafts_have_the_residual_distribution() -> None:
    n = 200_000
    p, q = gaussian(0.0, 1.0, n), gaussian(1.0, 1.0, n)
    y = samples(q, 1)
    lost = ~accepts(y, p, q, uniforms(n, 2))
    rest = np.maximum(density(0, 1) - density(1, 1), 0)
    assert fits(reflected(y[lost], p.at(lost), q.at(lost))[:, 0], rest / rest.sum() / (GRID[1] - GRID[0]))


def test_a_reflection_by_hand() -> None:
    p, q = Gaussian(torch.zeros(1, 2), torch.ones(1, 2)), Gaussian(torch.tensor([[2.0, 0.0]]), torch.ones(1, 2))
    assert reflected(torch.tensor([[3.0, 0.5]]), p, q).tolist() == [[-1.0, 0.5]]


@pytest.mark.parametrize("d", [1, 3, 16])
@pytest.mark.parametrize("equal", [True, False])
def test_the_outcome_has_the_distribution_of_the_target(d: int, equal: bool) -> None:
    """All numbers jointly, for distributions that differ from row to row."""
    n = 32_768
    g = generator(4)
    p = Gaussian(torch.randn(n, d, generator=g), 0.5 + torch.rand(n, d, generator=g))
    apart = torch.randn(n, d, generator=g) * 1.5 / d**0.5
    std = p.std if equal else p.std * (0.3 * torch.randn(n, d, generator=g) / d**0.5).exp()
    y, kept = coupled(p, Gaussian(p.mean + apart * p.std, std))
    assert 0.3 < kept.double().mean() < 0.8
    assert abs(normality_z(((y - p.mean) / p.std).double(), d)) < 4


def test_the_outcome_of_a_wrong_factor() -> None:
    """min(q, f p) + (1 - A) / (f - A) (f p - q)+ with A the mass of min(q, f p); here 0.1 in TV from p."""
    n, f = 100_000, 1.7
    p, q, width = density(0, 1), density(0.3, 1.1), GRID[1] - GRID[0]
    share = np.minimum(q, f * p).sum() * width
    expected = np.minimum(q, f * p) + (1 - share) / (f - share) * np.maximum(f * p - q, 0)
    assert 0.5 * abs(expected - p).sum() * width == pytest.approx(0.099, abs=0.002)
    factor = torch.full((n,), math.log(f), dtype=torch.float64)
    y, kept = coupled(gaussian(0.0, 1.0, n), gaussian(0.3, 1.1, n), log_factor=factor)
    assert float(kept.double().mean()) == pytest.approx(share, abs=0.005)
    assert fits(y[:, 0], expected) and not fits(y[:, 0], p)


def test_an_empty_residual_ends_in_a_sample_from_the_target() -> None:
    n = 4_000
    count: list[int] = []
    p = gaussian(0.0, 1.0, n)
    x = residual(p, gaussian(0.0, 1.0, n), trials(1, 256, counted=count), torch.full((n,), math.log(0.5)))
    assert len(count) == MOST_RELAXED_TRIALS // 256 and fits(x[:, 0], density(0, 1))


def test_rows_of_equal_covariance_need_no_trials() -> None:
    """Their residual may be all but empty."""
    p = gaussian(0.0, 1.0, 3)
    q = Gaussian(torch.tensor([[1e-9], [0.5], [1e-9]]), torch.tensor([[1.0], [1.3], [1.0]]))
    y = torch.tensor([[0.2], [-0.4], [0.1]])
    count: list[int] = []
    out = replaced(y, p, q, trials(1, counted=count))
    assert set(count) == {1} and torch.allclose(out[[0, 2]], -y[[0, 2]], atol=1e-6)


def test_a_row_does_not_lean_on_the_others() -> None:
    n = 64
    noise = torch.randn(n, 4096, 2, generator=generator(1)), uniforms(n * 4096, 2).view(n, 4096)

    def of(rows: Tensor) -> Callable[[int, Tensor], tuple[Tensor, Tensor]]:
        at = slice(0, 8)
        return lambda block, r: tuple(t[rows[r], at.stop * block : at.stop * (block + 1)] for t in noise)  # type: ignore[return-value]

    p = gaussian(0.0, 1.0, n, 2)
    q = Gaussian(torch.randn(n, 2, generator=generator(3)) * 0.5, 1 + torch.rand(n, 2, generator=generator(4)))
    every = residual(p, q, of(torch.arange(n)))
    alone = [residual(p.at(i), q.at(i), of(i)) for i in torch.arange(n).split(1)]
    assert torch.equal(every, torch.cat(alone))


def test_narrow_distributions_of_many_numbers() -> None:
    """The product of 64 densities of 0.0047 is beyond doubles, and its logarithm is not; fp32 tokens are enough."""
    g = generator(6)
    mean = torch.randn(100, 64, generator=g, dtype=torch.float64) * 0.05
    p = Gaussian(mean, torch.full_like(mean, 0.0047))
    q = Gaussian(mean + 0.0047 * torch.randn(100, 64, generator=g) / 8, p.std * 1.01)
    y = q.sample(torch.randn(100, 64, generator=g, dtype=torch.float64))
    exact = log_ratio(y, p, q)
    single = log_ratio(y.float(), *(Gaussian(gaussian.mean.float(), gaussian.std.float()) for gaussian in (p, q)))
    assert bool(exact.isfinite().all()) and single.dtype == torch.float64
    assert float((single - exact).abs().max()) < 1e-4
    far = Gaussian(p.mean + 1, p.std)
    assert not accepts(y, far, q, torch.full((100,), 1e-300, dtype=torch.float64)).any()  # -1e6 and not an error
