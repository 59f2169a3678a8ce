"""Couplings of Gaussian distributions, as pure functions on tensors: the continuous counterpart of `verification`.

A draft y sampled from Q is accepted with probability min(1, P(y) / Q(y)), or else replaced by a sample from the
residual (P - Q)+ / Z; the result has the distribution P (Leviathan et al. 2023, arXiv:2211.17192). Covariances here
are diagonal. Ratios are of logarithms and in float64: sixteen standard deviations of 0.006 multiply to 6e-36.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MOST_TRIALS = 2**20
MOST_RELAXED_TRIALS = 2**10


class Gaussian(NamedTuple):
    """`mean` and `std`, both [..., d]."""

    mean: Tensor
    std: Tensor

    def at(self, rows: Tensor) -> Gaussian:
        return Gaussian(self.mean[rows], self.std[rows])

    def sample(self, normals: Tensor) -> Tensor:
        """A sample [..., d] for standard normals [..., d]."""
        return self.mean + self.std * normals


# For a block number and the rows [r] that still wait: standard normals [r, n, d] and uniforms [r, n] of n trials.
Trials = Callable[[int, Tensor], tuple[Tensor, Tensor]]


def log_ratio(y: Tensor, p: Gaussian, q: Gaussian) -> Tensor:
    """log P(y) - log Q(y), float64 [...], for y [..., d]."""

    def log_density(gaussian: Gaussian) -> Tensor:
        std = gaussian.std.double()
        return -0.5 * ((y.double() - gaussian.mean.double()) / std).square() - std.log()

    return (log_density(p) - log_density(q)).sum(-1)


def accepts(y: Tensor, p: Gaussian, q: Gaussian, uniforms: Tensor, log_factor: Tensor | float = 0.0) -> Tensor:
    """Which drafts [...] are accepted, for uniforms [...]. A `log_factor` other than 0 makes the rule relaxed."""
    return uniforms.log() < log_ratio(y, p, q) + log_factor


def reflected(y: Tensor, p: Gaussian, q: Gaussian) -> Tensor:
    """What replaces rejected drafts [R, d] where P and Q have one covariance: their mirror image.

    The normal that sampled y from Q is reflected at the hyperplane between the means and used with P, which turns the
    residual of Q to that of P; so no trials are needed (De Bortoli et al. 2025, arXiv:2501.05370).
    """
    gap = (p.mean - q.mean).double() / p.std.double()
    e = gap / gap.norm(dim=-1, keepdim=True)
    z = (y - q.mean).double() / q.std.double()
    z = z - 2 * (e * z).sum(-1, keepdim=True) * e
    return (p.mean.double() + p.std.double() * z).to(y.dtype)


def residual(p: Gaussian, q: Gaussian, trials: Trials, log_factor: Tensor | None = None) -> Tensor:
    """Samples [R, d] from (P - Q)+ / Z by trial: x from P is taken with probability 1 - Q(x) / P(x).

    That takes 1 / TV(P, Q) trials on average. After 2**20 a row takes what came last; as it gets here only with
    probability TV, its distribution is wrong by less than 4e-7. A `log_factor` [R] f makes it (f P - Q)+ / Z; where f
    is below 1 that may be all but empty, so after 2**10 trials the row takes a sample from P.
    """
    most = MOST_TRIALS if log_factor is None else MOST_RELAXED_TRIALS
    # Rows that overflowed have no distribution; their tokens become NaN.
    rows = torch.stack([*p, *q]).isfinite().all(0).all(-1).nonzero()[:, 0]
    out = torch.full_like(p.mean, math.nan)
    tried = block = 0
    while len(rows):
        normals, uniforms = trials(block, rows)
        some, other = (Gaussian(gaussian.mean[rows, None], gaussian.std[rows, None]) for gaussian in (p, q))
        x = some.sample(normals)
        log_r = log_ratio(x, some, other)
        if log_factor is not None:
            log_r = log_r + log_factor[rows, None]
        taken = uniforms < -torch.expm1(-log_r)
        first = taken.int().argmax(1)
        out[rows] = x[torch.arange(len(rows), device=x.device), first]
        block, tried = block + 1, tried + x.shape[1]
        if tried >= most:
            break
        rows = rows[~taken.any(1)]
    return out


def replaced(y: Tensor, p: Gaussian, q: Gaussian, trials: Trials) -> Tensor:
    """What replaces rejected drafts y [R, d]: the mirror image where covariances agree, else a sample by trial."""
    out = reflected(y, p, q)
    differ = (p.std != q.std).any(-1).nonzero()[:, 0]
    if len(differ):
        out[differ] = residual(p.at(differ), q.at(differ), lambda block, rows: trials(block, differ[rows]))
    return out
