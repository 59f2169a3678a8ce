"""A test of samplers of continuous tokens where no distribution is known, as on trained weights.

The rank test is simulation-based calibration (Talts et al. 2018, arXiv:1804.06788). A token is set among others that
plain denoising samples given what its image had before it; if it has their distribution, its rank is uniform, and
independent of the other tokens' ranks. It needs no second sampler, and asks for the distribution given the prefix,
which marginals do not show.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visar.engine.loop import decode
from visar.engine.masked_session import MaskedSession
from visar.engine.rng import Noise
from visar.eval.exactness.normality import log_p_chi2, log_p_normals, worst
from visar.samplers import ContinuousSpeculative, ContinuousTarget, MaskedAutoregressive
from visar.samplers.masked import NoiseBank, plan


class Ranks(NamedTuple):
    """`ranks` [B, F] of the free tokens in sampling order, 0 to `fresh`; `z` is about standard normal if exact."""

    ranks: Tensor
    z: float


@torch.inference_mode()
def rank_test(
    make: Callable[[Tensor], MaskedSession],
    sampler: Any,
    images: Tensor,
    target: ContinuousTarget | None = None,
    seed: int = 0,
    fresh: int = 19,
) -> Ranks:
    """Ranks of a sampler's tokens among `fresh` others; `make` gives a session for image indices [B].

    A token and the others are compared along a random direction of its own. z is that of the worst of the chi-square
    tests of each token's ranks and of the correlations of each with the next, corrected for their number. With 4,000
    images it finds a mean that is off by a tenth of a token's standard deviation.
    """
    target = target or ContinuousTarget()
    tokens = decode(make(images), sampler, target, Noise(seed, images)).tokens
    session = make(images)
    free = session.length - session.given
    if isinstance(
        sampler, ContinuousSpeculative
    ):  # the distribution that it has is that of plain decoding, token by token
        sampler = MaskedAutoregressive(free, sampler.head_steps, latest=sampler.latest, last_noise=True)
    rows, parts, done = torch.arange(len(images)), [], session.given
    directions = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(seed)).to(tokens.device)
    for turn, (count, known) in enumerate(plan(free, sampler.steps)):
        ask = session.order[:, done : done + count]
        told = torch.full_like(ask, session.given + known)
        condition = session.context(tokens, rows, session.order[:, :done], ask, told).flatten(0, 1)
        denoiser = sampler.denoiser_of(session, target, turn)

        def along(x: Tensor, at: Tensor = ask) -> Tensor:
            return (x * directions.gather(1, at[..., None].expand_as(x))).sum(-1)

        own = along(tokens.gather(1, ask[..., None].expand(-1, -1, session.dim)))
        rank = torch.zeros_like(ask)
        for k in range(fresh):
            noise = Noise(seed + 1 + k, images)
            bank = NoiseBank.sample(noise, rows.repeat_interleave(count), ask.flatten(), denoiser)
            rank += along(denoiser.denoise(condition, bank.start, bank.steps).unflatten(0, ask.shape)) < own
        parts.append(rank)
        done += count
    ranks = torch.cat(parts, 1)
    return Ranks(ranks, rank_z(ranks, fresh + 1))


def rank_z(ranks: Tensor, cells: int) -> float:
    """z of ranks [B, F] that should be independent and uniform on 0 .. cells - 1."""
    n, free = ranks.shape
    counts = torch.stack([torch.bincount(column, minlength=cells) for column in ranks.T]).double()
    chi2 = ((counts - n / cells).square() / (n / cells)).sum(1)
    scores = (ranks - (cells - 1) / 2) / math.sqrt((cells**2 - 1) / 12)
    lags = (scores[:, 1:] * scores[:, :-1]).double().sum(0) / math.sqrt(n)
    return worst(
        torch.cat([log_p_chi2(chi2, cells - 1), log_p_chi2(chi2.sum()[None], free * (cells - 1)), log_p_normals(lags)])
    )
