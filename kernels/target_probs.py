"""From logits to the target distribution, without a sort: guidance; temperature, top-k, softmax, top-p, forced tokens.

Where a sort would give the k-th largest logit, and the probability at which the nucleus ends, the Triton form finds
both by bisection over the bits of the number, two bits at a time: the order of floats is that of their bits. Masses are
summed as integers, in units of 2**-60, so that the sums are exact in any order and a row has the same distribution
at any position of a batch or window.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from visar.kernels.backend import jit, tl, triton, use_triton

RESIDENT = 16384  # tokens that a program holds in registers
BLOCK = 8192  # and how many at a time, of more
MOST = 2**21  # a program counts no further


def guide(cond: Tensor, uncond: Tensor, scale: float | Tensor, guided: Tensor | None = None) -> Tensor:
    """u + scale (c - u), fp32, for logits c and u [B, W, V] of any dtype; c alone where not `guided` [B, W].

    `scale` is a number, or [B], fp32.
    """
    form = guide_triton if use_triton(cond) else guide_torch
    return form(cond, uncond, scale, guided)


def guide_torch(cond: Tensor, uncond: Tensor, scale: float | Tensor, guided: Tensor | None = None) -> Tensor:
    c, u = cond.float(), uncond.float()
    both = u + _of_rows(scale) * (c - u)
    return both if guided is None else torch.where(guided[..., None], both, c)


def guide_triton(cond: Tensor, uncond: Tensor, scale: float | Tensor, guided: Tensor | None = None) -> Tensor:
    """`guide_torch` as one launch, which reads the logits of both batches and writes one in fp32."""
    cond, uncond = _rows(cond), _rows(uncond)
    batch, window, size = cond.shape
    out = torch.empty(batch, window, size, device=cond.device)
    if out.numel():
        _guide[(batch * window, triton.cdiv(size, 1024))](
            out, cond, uncond, *_flags(guided, cond), _argument(scale), size, window, *cond.stride()[:2],
            *uncond.stride()[:2], by_row=isinstance(scale, Tensor), some=guided is not None, block=1024,
        )  # fmt: skip
    return out


def target_probs(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    forced: Tensor | None = None,
) -> Tensor:
    """The target distribution [B, W, V], fp32, of guided logits [B, W, V]; see `visar.samplers.distribution.Target`.

    `forced` [B, W] are tokens that are certain, -1 where there is none. Each setting is a number, or [B], fp32 or for
    `top_k` int64, for rows with settings of their own.
    """
    form = target_probs_triton if logits.shape[-1] < MOST and use_triton(logits) else target_probs_torch
    return form(logits, temperature, top_k, top_p, forced)


def target_probs_torch(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    forced: Tensor | None = None,
) -> Tensor:
    x = logits.float() / _of_rows(temperature)
    size = x.shape[-1]
    if isinstance(top_k, Tensor):
        last = torch.where(top_k > 0, top_k, size).clamp_max(size) - 1
        least = descending(x).gather(-1, _of_rows(last).expand(*x.shape[:2], 1))
        x = torch.where(x < least, -torch.inf, x)
    elif 0 < top_k < size:
        least = x.topk(top_k, sorted=False).values.amin(-1, keepdim=True)
        x = torch.where(x < least, -torch.inf, x)
    p = x.softmax(-1)
    if isinstance(top_p, Tensor):
        share = _of_rows(top_p)
        p = torch.where(share < 1, nucleus(p, share), p)
    elif top_p < 1:
        p = nucleus(p, top_p)
    if forced is not None:
        p = torch.where((forced >= 0)[..., None], F.one_hot(forced.clamp_min(0), p.shape[-1]).to(p.dtype), p)
    return p


def nucleus(p: Tensor, top_p: float | Tensor) -> Tensor:
    """The largest probabilities up to and with the one that passes `top_p`, renormalised; the others are 0.

    Of equal ones at the end the first tokens stay, so that equal logits give equal distributions in whatever window
    they were computed.
    """
    ordered = descending(p)
    count = (ordered.cumsum(-1) - ordered <= top_p).sum(-1, keepdim=True)
    cut = ordered.gather(-1, (count - 1).clamp_min(0))
    above, equal = p > cut, p == cut
    room = count - above.sum(-1, keepdim=True)
    p = torch.where(above | equal & (equal.cumsum(-1) <= room), p, 0.0)
    return p / p.sum(-1, keepdim=True)


def descending(p: Tensor) -> Tensor:
    if p.device.type == "cpu":  # numpy sorts five times as fast
        return torch.from_numpy(np.sort(p.detach().numpy())).flip(-1)
    return p.sort(dim=-1, descending=True).values


def target_probs_triton(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    forced: Tensor | None = None,
) -> Tensor:
    """`target_probs_torch` as one launch, a program for each row.

    A row of up to 16,384 tokens is read once and written once, 8 V bytes from fp32 logits; in between it stays in
    registers. A longer one is read again in every step of a bisection, from the L2 cache: 19 times for top-k, 18 more
    for top-p.
    """
    logits = _rows(logits)
    batch, window, size = logits.shape
    out = torch.empty(batch, window, size, device=logits.device)
    tokens = out if forced is None else forced.expand(batch, window)
    if out.numel():
        whole = size <= RESIDENT
        by_count = isinstance(top_k, Tensor) or 0 < top_k < size
        by_mass = isinstance(top_p, Tensor) or top_p < 1
        block = max(triton.next_power_of_2(size), 128) if whole else BLOCK
        _target_probs[(batch * window,)](
            out, logits, tokens, _argument(temperature), top_k, _argument(top_p), size, window, *logits.stride()[:2],
            *tokens.stride()[:2], own_temperature=isinstance(temperature, Tensor),
            own_top_k=isinstance(top_k, Tensor), own_top_p=isinstance(top_p, Tensor), by_count=by_count,
            by_mass=by_mass, certain=forced is not None, whole=whole, block=block,
            num_warps=16 if block > 4096 else 8 if block > 1024 else 4,
        )  # fmt: skip
    return out


def _of_rows(value: Any) -> Any:
    """A number, or [B] as [B, 1, 1]."""
    return value[:, None, None] if isinstance(value, Tensor) else value


def _argument(value: float | Tensor) -> float | Tensor:
    """For a kernel, to which an integer would be one of another type."""
    return value if isinstance(value, Tensor) else float(value)


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _flags(guided: Tensor | None, like: Tensor) -> tuple[Tensor, int, int]:
    """The flags and their steps; something that is never read where there are none."""
    if guided is None:
        return like, 0, 0
    guided = guided.expand(like.shape[:2])
    return guided, guided.stride(0), guided.stride(1)


@jit
def _scores(logits, temperature, start, size, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logits over temperature, from the token `start` on, fp32; -inf after the end."""
    at = start + tl.arange(0, block)
    x = tl.load(logits + at, at < size, float("-inf")).to(tl.float32)
    return tl.div_rn(x, tl.zeros_like(x) + temperature)


@jit
def _ranked(x):  # type: ignore[no-untyped-def]
    """Integers, uint32, in the order of the floats x."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, ~bits, bits | 0x80000000)


@jit
def _unranked(rank):  # type: ignore[no-untyped-def]
    return tl.where(rank >= 0x80000000, rank & 0x7FFFFFFF, ~rank).to(tl.float32, bitcast=True)


@jit
def _reached(rank, one, two, three):  # type: ignore[no-untyped-def]
    """Which of three thresholds a rank reaches: three counts in one integer of 64 bits."""
    a, b, c = (rank >= one).to(tl.int64), (rank >= two).to(tl.int64), (rank >= three).to(tl.int64)
    return a + (b << 21) + (c << 42)


@jit
def _mass(p):  # type: ignore[no-untyped-def]
    return (p * 1152921504606846976.0).to(tl.int64)


@jit
def _reaching(p, one, two, three):  # type: ignore[no-untyped-def]
    """The mass of p at each of three thresholds and above, with the bits of p as its rank."""
    rank, mass = p.to(tl.int32, bitcast=True), _mass(p)
    return tl.where(rank >= one, mass, 0), tl.where(rank >= two, mass, 0), tl.where(rank >= three, mass, 0)


@jit
def _final(  # type: ignore[no-untyped-def]
    p, cut, room, share, before, token, at, by_mass: tl.constexpr, certain: tl.constexpr
):
    """The final probabilities of the tokens `at` with probabilities p, after `before` others that equal the cut."""
    if by_mass:
        rank = p.to(tl.int32, bitcast=True)
        equal = rank == cut
        number = before + tl.cumsum(equal.to(tl.int32), 0)
        p = tl.where((rank > cut) | (equal & (number <= room)), tl.div_rn(p, tl.zeros_like(p) + share), 0.0)
    if certain:
        p = tl.where(token >= 0, (at == token).to(tl.float32), p)
    return p


@jit
def _target_probs(  # type: ignore[no-untyped-def]
    out, logits, forced, temperature, top_k, top_p, size, width, logits_row, logits_column, forced_row, forced_column,
    own_temperature: tl.constexpr, own_top_k: tl.constexpr, own_top_p: tl.constexpr, by_count: tl.constexpr,
    by_mass: tl.constexpr, certain: tl.constexpr, whole: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, column = program // width, program % width
    if own_temperature:
        temperature = tl.load(temperature + row)
    if own_top_k:
        top_k = tl.load(top_k + row)
        top_k = tl.where((top_k > 0) & (top_k < size), top_k, size)
    if own_top_p:
        top_p = tl.load(top_p + row)
    out += program * size
    logits += row * logits_row + column * logits_column
    lane = tl.arange(0, block)
    x = _scores(logits, temperature, 0, size, block)

    least = tl.full((), float("-inf"), tl.float32)
    if by_count:
        # The largest rank that top_k logits reach, from its highest two bits on.
        rank, found, unit = _ranked(x), tl.full((), 0, tl.uint32), tl.full((), 1 << 30, tl.uint32)
        for _ in range(16):
            one, two, three = found + unit, found + unit * 2, found + unit * 3
            if whole:
                counts = tl.sum(_reached(rank, one, two, three))
            else:
                sums = tl.zeros([block], tl.int64)
                for start in range(0, size, block):
                    y = _scores(logits, temperature, start, size, block)
                    sums += _reached(_ranked(y), one, two, three)
                counts = tl.sum(sums)
            found = tl.where((counts & 0x1FFFFF) >= top_k, one, found)
            found = tl.where(((counts >> 21) & 0x1FFFFF) >= top_k, two, found)
            found = tl.where((counts >> 42) >= top_k, three, found)
            unit = unit >> 2
        least = _unranked(found)

    # Softmax. What is not resident goes to `out`, and is read again from there.
    if whole:
        x = tl.where(x < least, float("-inf"), x)
        e = tl.exp(x - tl.max(x))
        p = tl.div_rn(e, tl.zeros_like(e) + tl.sum(e))
    else:
        highest = x
        for start in range(block, size, block):
            highest = tl.maximum(highest, _scores(logits, temperature, start, size, block))
        peak = tl.max(highest)
        sum_e = tl.zeros([block], tl.float32)
        for start in range(0, size, block):
            y = _scores(logits, temperature, start, size, block)
            sum_e += tl.exp(tl.where(y < least, float("-inf"), y) - peak)
        total = tl.zeros([block], tl.float32) + tl.sum(sum_e)
        masses = tl.zeros([block], tl.int64)
        for start in range(0, size, block):
            y = _scores(logits, temperature, start, size, block)
            p = tl.div_rn(tl.exp(tl.where(y < least, float("-inf"), y) - peak), total)
            masses += _mass(p)
            tl.store(out + start + lane, p, start + lane < size)
        tl.debug_barrier()
        p = tl.load(out + lane, lane < size, 0.0)

    # The nucleus: `cut` is the largest number that the probabilities which reach it exceed top_p with, or 0. What is
    # above it stays, and of what equals it the first `room` tokens.
    cut, room, share = tl.full((), 0, tl.int32), size, 1.0
    if by_mass:
        # Of the sum that there is, which rounding may leave a little off 1. Less what top_p leaves out, so that a top_p
        # that is 1 but for rounding drops nothing.
        reaching = tl.sum(_mass(p)) if whole else tl.sum(masses)
        out_of_it = (1 - (tl.full((), 0.0, tl.float32) + top_p).to(tl.float64)) * reaching.to(tl.float64)
        limit, unit = reaching - out_of_it.to(tl.int64), tl.full((), 1 << 28, tl.int32)
        above = limit * 0
        for _ in range(15):
            one, two, three = cut + unit, cut + unit * 2, cut + unit * 3
            if whole:
                a, b, c = _reaching(p, one, two, three)
            else:
                a, b, c = tl.zeros([block], tl.int64), tl.zeros([block], tl.int64), tl.zeros([block], tl.int64)
                for start in range(0, size, block):
                    part = tl.load(out + start + lane, start + lane < size, 0.0)
                    a_, b_, c_ = _reaching(part, one, two, three)
                    a, b, c = a + a_, b + b_, c + c_
            a, b, c = tl.sum(a), tl.sum(b), tl.sum(c)
            above = tl.where(a <= limit, a, tl.where(b <= limit, b, tl.where(c <= limit, c, above)))
            reaching = tl.where(c > limit, c, tl.where(b > limit, b, tl.where(a > limit, a, reaching)))
            cut = tl.where(c > limit, three, tl.where(b > limit, two, tl.where(a > limit, one, cut)))
            unit = unit >> 2
        each = tl.maximum(_mass(cut.to(tl.float32, bitcast=True)), 1)
        equal = (reaching - above) // each
        room = tl.minimum((limit - above) // each + 1, equal)
        remaining = tl.where(cut == 0, reaching, above + room * each)
        share = remaining.to(tl.float32) * 8.673617379884035e-19
        if own_top_p and top_p >= 1:
            cut, room, share = cut * 0, size + room * 0, share * 0 + 1

    token = tl.full((), -1, tl.int64)
    if certain:
        token = tl.load(forced + row * forced_row + column * forced_column)
    if whole:
        tl.store(out + lane, _final(p, cut, room, share, 0, token, lane, by_mass, certain), lane < size)
    else:
        before = room * 0  # tokens in front of this block that equal the cut
        for start in range(0, size, block):
            at = start + lane
            part = tl.load(out + at, at < size, 0.0)
            tl.store(out + at, _final(part, cut, room, share, before, token, at, by_mass, certain), at < size)
            before += tl.sum((part.to(tl.int32, bitcast=True) == cut).to(tl.int32))


@jit
def _guide(  # type: ignore[no-untyped-def]
    out, cond, uncond, guided, guided_row, guided_column, scale, size, width, cond_row, cond_column, uncond_row,
    uncond_column, by_row: tl.constexpr, some: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, column = program // width, program % width
    if by_row:
        scale = tl.load(scale + row)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < size
    c = tl.load(cond + row * cond_row + column * cond_column + at, inside, 0.0).to(tl.float32)
    u = tl.load(uncond + row * uncond_row + column * uncond_column + at, inside, 0.0).to(tl.float32)
    both = u + scale * (c - u)
    if some:
        both = tl.where(tl.load(guided + row * guided_row + column * guided_column) != 0, both, c)
    tl.store(out + program * size + at, both, inside)
