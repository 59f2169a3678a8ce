"""Samples from distributions over the vocabulary: by inverse CDF with one uniform, and by exponential noise."""

from __future__ import annotations

import torch
from torch import Tensor

from visar.kernels.backend import jit, tl, triton, use_triton
from visar.kernels.noise import ExponentialNoise, exponentials, noise_counter


def sample(weights: Tensor, u: Tensor) -> Tensor:
    """Tokens [...] by inverse CDF from unnormalised weights [..., V], with one uniform [...] each.

    The token is the first whose cumulative weight is above u times the total. The sums are in float64, so that a
    distribution over 200,000 tokens does not lose its tail.
    """
    return sample_triton(weights, u) if use_triton(weights) else sample_torch(weights, u)


def sample_torch(weights: Tensor, u: Tensor) -> Tensor:
    cdf = weights.cumsum(-1, dtype=torch.float64)
    at = torch.searchsorted(cdf, (u.to(cdf.dtype) * cdf[..., -1]).unsqueeze(-1), right=True).squeeze(-1)
    return at.clamp_max(weights.shape[-1] - 1)


def sample_triton(weights: Tensor, u: Tensor) -> Tensor:
    """`sample_torch` as one launch; it reads each row twice, and its sums are rounded in another order."""
    size = weights.shape[-1]
    w, v = _rows(weights), u.double().expand(weights.shape[:-1])
    v = v.reshape(w.shape[:2])
    out = torch.empty(v.shape, dtype=torch.long, device=w.device)
    if out.numel():
        _sample[(out.numel(),)](out, w, v, size, w.shape[1], *w.stride(), *v.stride(), **tiles(size))
    return out.view(weights.shape[:-1])


def sample_gumbel(p: Tensor, exponential: ExponentialNoise) -> Tensor:
    """Tokens [B, W] by exponential noise: argmax p/e, a sample from p [B, W, V]; the first of equals is taken."""
    return sample_gumbel_triton(p, exponential) if use_triton(p) else sample_gumbel_torch(p, exponential)


def sample_gumbel_torch(p: Tensor, exponential: ExponentialNoise) -> Tensor:
    return (p / exponential.make()).argmax(-1)


def sample_gumbel_triton(p: Tensor, exponential: ExponentialNoise) -> Tensor:
    """`sample_gumbel_torch` as one launch that reads p once and makes the noise in registers."""
    out = torch.empty(p.shape[:2], dtype=torch.long, device=p.device)
    if out.numel():
        _sample_gumbel[(out.numel(),)](
            out,
            p,
            p.shape[-1],
            p.shape[1],
            *p.stride(),
            *exponential.arguments(),
            **exponential.constants(),
            **tiles(p.shape[-1]),
        )
    return out


def tiles(size: int) -> dict[str, int]:
    """How a program of one row walks over it: in blocks of so many tokens, with so many warps."""
    block = min(max(triton.next_power_of_2(size), 128), 8192)
    return dict(block=block, num_warps=max(block // 1024, 4))


def _rows(weights: Tensor) -> Tensor:
    """Weights [R, W, V] of the same rows, each with its tokens side by side or all one; a view where there is one."""
    while weights.ndim < 3:
        weights = weights.unsqueeze(0)
    weights = weights.flatten(0, -3)
    return weights if weights.stride(-1) in (0, 1) else weights.contiguous()


@jit
def _left(p, q, p_step, q_step, spare, at, size, two: tl.constexpr):  # type: ignore[no-untyped-def]
    """The weights at `at`, float64, 0 after the end: p, or where `spare` p less q."""
    w = tl.load(p + at * p_step, at < size, 0.0)
    if two:
        w = tl.maximum(w - tl.load(q + at * q_step, at < tl.where(spare, size, 0), 0.0), 0.0)
    return w.to(tl.float64)


@jit
def inverse_cdf(  # type: ignore[no-untyped-def]
    p, q, p_step, q_step, spare, equal, u, size, two: tl.constexpr, block: tl.constexpr
):
    """A token sampled with u from the row p, or where `spare` from (p - q)+, if that has a mass of `equal` or more.

    For use inside other kernels: pointers to rows with their steps, `u` float64; q is not read unless `two`. Two
    sweeps over the row: one for the total, one for the block in which the cumulative weight passes u times it.
    """
    lane = tl.arange(0, block)
    total = tl.zeros([block], tl.float64)
    for start in range(0, size, block):
        total += _left(p, q, p_step, q_step, False, start + lane, size, False)
    mass = tl.sum(total)
    if two:
        left = tl.zeros([block], tl.float64)
        for start in range(0, size, block):
            left += _left(p, q, p_step, q_step, spare, start + lane, size, True)
        rest = tl.sum(left)
        spare = spare & (rest >= equal)
        mass = tl.where(spare, rest, mass)
    goal = u * mass
    before = mass * 0  # the weight in front of the block at hand
    base = before
    first = 0
    for start in range(0, size, block):
        here = tl.sum(_left(p, q, p_step, q_step, spare, start + lane, size, two))
        # Rounding may leave the goal at the very end: then it is the last block with any weight.
        reached = (before <= goal) & (here > 0)
        first = tl.where(reached, start, first)
        base = tl.where(reached, before, base)
        before += here
    at = first + lane
    w = _left(p, q, p_step, q_step, spare, at, size, two)
    passed = (w > 0) & (base + tl.cumsum(w, 0) > goal)
    token = tl.min(tl.where(passed, at, size))
    last = tl.max(tl.where(w > 0, at, -1))
    last = tl.where(last < 0, size - 1, last)  # no weight at all
    return tl.where(token < size, token, last)


@jit
def gumbel_argmax(p, p_step, size, c1, c2, c3, k0, k1, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """The argmax of p/e over the row p, for the exponential noise of this position; for use inside other kernels."""
    lane = tl.arange(0, block)
    best = tl.full([block], -1.0, tl.float32)
    token = tl.zeros([block], tl.int32)
    for start in range(0, size, block):
        at = start + lane
        w = tl.load(p + at * p_step, at < size, 0.0)
        score = tl.div_rn(w, exponentials(start, c1, c2, c3, k0, k1, block))
        score = tl.where(at < size, score, -1.0)
        token = tl.where(score > best, at, token)
        best = tl.maximum(best, score)
    return tl.min(tl.where(best == tl.max(best), token, size - 1))


@jit
def _sample(  # type: ignore[no-untyped-def]
    out, weights, u, size, width, row_step, column_step, step, u_row, u_column, block: tl.constexpr
):
    program = tl.program_id(0)
    row, column = (program // width).to(tl.int64), (program % width).to(tl.int64)
    p = weights + row * row_step + column * column_step
    goal = tl.load(u + row * u_row + column * u_column)
    tl.store(out + program, inverse_cdf(p, p, step, step, False, 0.0, goal, size, False, block))


@jit
def _sample_gumbel(  # type: ignore[no-untyped-def]
    out, weights, size, width, row_step, column_step, step, key, images, keys, positions, passes, image_step, key_step,
    seed_step, noise_row, noise_column, turn_step, purpose: tl.constexpr, turn_read: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row, column = (program // width).to(tl.int64), (program % width).to(tl.int64)
    c1, c2, c3, k0, k1 = noise_counter(
        key, images, keys, positions, passes, image_step, key_step, seed_step, noise_row, noise_column, turn_step, row,
        column, purpose, turn_read,
    )  # fmt: skip
    p = weights + row * row_step + column * column_step
    tl.store(out + program, gumbel_argmax(p, step, size, c1, c2, c3, k0, k1, block))
