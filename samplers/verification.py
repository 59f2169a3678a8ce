"""Verification of drafted chains: pure functions on tensors, `(p, q, drafts, noise) -> (tokens, accepted)`.

A window of W inputs gives the target distributions p [B, W, V] and tests W - 1 drafts d [B, W-1] against the
distributions q [B, W-1, V] that they were really sampled from. All rules here are exact: the committed tokens follow p
whatever q is, if

1. every draft has the stored distribution q, given what happened at earlier positions;
2. the uniform and the residual sample at a position are fresh;
3. whether a position is committed never depends on later positions;
4. p is a function of the position and its prefix alone.

`verify_block` is the exception: it looks at a chain as a whole, has its own proof, and is for draft models only.

The rules differ only in what becomes of the drafts behind the first rejection. All of them return the tokens
[B, W] of the whole window, the first `accepted` + 1 of which are committed; the others are the next drafts, and
their distribution is p. Proof: Leviathan et al. 2023 (arXiv:2211.17192) per position, and the chain rule.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from visar.kernels.backend import use_triton
from visar.kernels.noise import ExponentialNoise
from visar.kernels.sample import sample, sample_gumbel
from visar.kernels.verify import MOST, Rule, verify_triton

EQUAL = 1e-7  # a residual with less mass than this means that p and q are one distribution


class StepNoise(NamedTuple):
    """Noise of a pass: `accept` and `sample` [B, W], uniform in (0, 1), float64, `exponential` [B, W, V], Exp(1)."""

    accept: Tensor
    sample: Tensor
    exponential: Tensor | ExponentialNoise | None = None


class Verified(NamedTuple):
    """`tokens` [B, W] of the window after the test; the drafts before position `accepted` [B] stood."""

    tokens: Tensor
    accepted: Tensor


Check = Callable[[Tensor, Tensor, Tensor, StepNoise], Verified]


def gumbel_max(p: Tensor, e: Tensor | ExponentialNoise) -> Tensor:
    """Tokens [...] sampled from p [..., V] by the exponential noise argmax p/e: the Gumbel-max trick without logs."""
    return sample_gumbel(p, e) if isinstance(e, ExponentialNoise) else (p / e).argmax(-1)


def fused(rule: Rule) -> Callable[[Check], Check]:
    """One launch where kernels are Triton's; elsewhere what it decorates, which says what is meant."""

    def decorate(plain: Check) -> Check:
        @functools.wraps(plain)
        def check(p: Tensor, q: Tensor, drafts: Tensor, noise: StepNoise) -> Verified:
            if isinstance(noise.exponential, Tensor) or p.shape[1] > MOST or not use_triton(p):
                return plain(p, q, drafts, noise)
            return Verified(*verify_triton(rule, p, q, drafts, noise.accept, noise.sample, noise.exponential, EQUAL))

        return check

    return decorate


def residual(p: Tensor, q: Tensor) -> Tensor:
    """Unnormalised (p - q)+ [..., V]; where there is next to none of it, p."""
    r = (p - q).clamp_min(0)
    return torch.where(r.sum(-1, keepdim=True) < EQUAL, p, r)


def accepts(p: Tensor, q: Tensor, drafts: Tensor, u: Tensor) -> Tensor:
    """The acceptance test u q(d) < p(d), [B, W-1] bool, for distributions [B, W-1, V] and uniforms [B, W-1]."""
    at = drafts.unsqueeze(-1)
    return u * q.gather(-1, at).squeeze(-1).double() < p.gather(-1, at).squeeze(-1).double()


def leading(kept: Tensor) -> Tensor:
    """How many drafts stand before the first that does not, [B], for kept [B, W-1]."""
    return kept.long().cumprod(-1).sum(-1)


def _columns(kept: Tensor) -> Tensor:
    return torch.arange(kept.shape[1] + 1, device=kept.device)


@fused("independent")
def verify_independent(p: Tensor, q: Tensor, drafts: Tensor, noise: StepNoise) -> Verified:
    """Speculative Jacobi decoding (Teng et al. 2024, arXiv:2410.01699): drafts behind a rejection are sampled again."""
    return replaced(p, q, drafts, accepts(p[:, :-1], q, drafts, noise.accept[:, :-1]), noise)


def replaced(p: Tensor, q: Tensor, drafts: Tensor, kept: Tensor, noise: StepNoise) -> Verified:
    """The first draft that is not among those `kept` [B, W-1] is sampled from the residual, those behind it from p."""
    accepted = leading(kept)
    column, first = _columns(kept), accepted[:, None]
    # One sample serves all columns: from the residual at the first rejection, from p behind it.
    rejected = (column == first)[:, :-1, None]
    weights = torch.cat([torch.where(rejected, residual(p[:, :-1], q), p[:, :-1]), p[:, -1:]], dim=1)
    fresh = sample(weights, noise.sample)
    tokens = torch.where(column < first, _padded(drafts), fresh)
    return Verified(tokens, accepted)


def verify_block(p: Tensor, q: Tensor, drafts: Tensor, noise: StepNoise) -> Verified:
    """Block verification (Sun et al. 2024, arXiv:2403.10444): the longest prefix of the chain that stands as a whole.

    For drafts that were sampled one after the other from q, as a draft model samples them; Jacobi drafts are not.
    """
    at = drafts.unsqueeze(-1)
    ratio = p[:, :-1].gather(-1, at).double() / q.gather(-1, at).double().clamp_min(1e-300)
    weight = [torch.ones_like(ratio[:, 0, 0])]  # min(1, the running product), from the empty prefix on
    for i in range(drafts.shape[1]):
        weight.append((weight[-1] * ratio[:, i, 0]).clamp_max(1))
    w = torch.stack(weight, 1)
    # The residual behind each proper prefix, and behind the whole chain p itself.
    left = torch.cat([(w[:, :-1, None] * p[:, :-1] - q).clamp_min(0), p[:, -1:].double()], dim=1)
    mass = left[:, 1:-1].sum(-1)
    short = mass + 1 - w[:, 1:-1]
    stands = torch.cat([torch.where(short < EQUAL, 1.0, mass / short.clamp_min(EQUAL)), w[:, -1:]], dim=1)
    column = _columns(drafts)
    kept = (noise.accept[:, :-1] < stands).long() * column[1:]
    accepted = kept.amax(-1)
    rows = torch.arange(len(p), device=p.device)
    weights = left[rows, accepted]
    weights = torch.where(weights.sum(-1, keepdim=True) < EQUAL, p[rows, accepted].double(), weights)
    fresh = sample(weights, noise.sample[rows, accepted])
    return Verified(torch.where(column < accepted[:, None], _padded(drafts), fresh[:, None]), accepted)


@fused("maximal")
def verify_maximal(p: Tensor, q: Tensor, drafts: Tensor, noise: StepNoise) -> Verified:
    """Coupled speculative Jacobi decoding, maximal coupling (MC-SJD): every draft is tested, also behind a rejection.

    A draft behind the first rejection becomes a sample of p that equals the old draft as often as possible.
    """
    kept = accepts(p[:, :-1], q, drafts, noise.accept[:, :-1])
    fresh = sample(torch.cat([residual(p[:, :-1], q), p[:, -1:]], dim=1), noise.sample)
    tokens = torch.cat([torch.where(kept, drafts, fresh[:, :-1]), fresh[:, -1:]], dim=1)
    return Verified(tokens, leading(kept))


@fused("gumbel")
def verify_gumbel(p: Tensor, q: Tensor, drafts: Tensor, noise: StepNoise) -> Verified:
    """Coupled speculative Jacobi decoding, Gumbel coupling: drafts of a position share their exponential noise.

    The residual is sampled with fresh noise; it must not see `noise.exponential`, which made the draft.
    """
    assert noise.exponential is not None
    kept = accepts(p[:, :-1], q, drafts, noise.accept[:, :-1])
    accepted = leading(kept)
    column, first = _columns(kept), accepted[:, None]
    shared = gumbel_max(p, noise.exponential)
    # The residual is needed in one column of each row only.
    at = accepted.clamp_max(q.shape[1] - 1)
    rows = torch.arange(len(p), device=p.device)
    fix = sample(residual(p[rows, at], q[rows, at]), noise.sample[rows, at])
    tokens = torch.where(column < first, _padded(drafts), shared)
    rejected = (column == first) & (column < q.shape[1])
    return Verified(torch.where(rejected, fix[:, None], tokens), accepted)


def verify_greedy(p: Tensor, drafts: Tensor) -> Verified:
    """Jacobi decoding (Song et al. 2021, arXiv:2002.03629): drafts stand while they equal the argmax of p."""
    best = p.argmax(-1)
    return Verified(best, leading(best[:, :-1] == drafts))


def _padded(drafts: Tensor) -> Tensor:
    return torch.cat([drafts, drafts[:, :1]], dim=1)
