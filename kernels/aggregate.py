"""LANTERN's pooling of codes that look alike (Jang et al. 2024, arXiv:2410.03355): gather, prefix sum, bound, move."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from visar.kernels.backend import jit, tl, triton, use_triton


def pool(r: Tensor, y: Tensor, table: Tensor, budget: float, share: float) -> tuple[Tensor, Tensor]:
    """The mass [B], float64, that the tokens y [B] are given of their neighbours', and r [B, V] with it moved to them.

    `table` [V, k]: neighbours, nearest first, none of them the token itself. The first n give theirs, for the largest
    n at which their mass in r is within `budget` + `share` * r(y).
    """
    return (pool_triton if use_triton(r) else pool_torch)(r, y, table, budget, share)


def pool_torch(r: Tensor, y: Tensor, table: Tensor, budget: float, share: float) -> tuple[Tensor, Tensor]:
    near = table[y]
    own = r.gather(-1, near)
    mass = own.double()
    bound = budget + share * r.gather(-1, y[:, None]).double()
    taken = torch.where(mass.cumsum(-1) <= bound, mass, 0.0)
    gain = taken.sum(-1)
    moved = r.scatter(-1, near, torch.where(taken > 0, 0.0, own))
    return gain, moved.scatter_add(-1, y[:, None], gain[:, None].to(r.dtype))


def pool_triton(r: Tensor, y: Tensor, table: Tensor, budget: float, share: float) -> tuple[Tensor, Tensor]:
    """`pool_torch` as one launch. A program has a part of a row, and adds up the neighbours by itself."""
    r = r if r.stride(-1) == 1 else r.contiguous()
    batch, size = r.shape
    gain, moved = torch.empty(batch, dtype=torch.float64, device=r.device), torch.empty_like(r)
    part = 4096
    if batch:
        _pool[(batch, triton.cdiv(size, part))](
            gain, moved, r, y, table, *_bits(budget, share), size, table.shape[1], r.stride(0), moved.stride(0),
            table.stride(0), part=part, block=min(triton.next_power_of_2(table.shape[1]), 1024),
        )  # fmt: skip
    return gain, moved


def _bits(*numbers: float) -> tuple[int, ...]:
    """The bits of float64 numbers: a launch would round them to fp32."""
    return struct.unpack(f"{len(numbers)}q", struct.pack(f"{len(numbers)}d", *numbers))


@jit
def _pool(  # type: ignore[no-untyped-def]
    gain, moved, r, tokens, table, budget, share, size, k, r_row, moved_row, table_row, part: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * part
    r += row * r_row
    moved += row * moved_row
    y = tl.load(tokens + row)
    table += y * table_row
    own = tl.load(r + y).to(tl.float64)
    budget = tl.full((), budget, tl.int64).to(tl.float64, bitcast=True)
    bound = budget + tl.full((), share, tl.int64).to(tl.float64, bitcast=True) * own
    at = first + tl.arange(0, part)
    inside = at < size
    tl.store(moved + at, tl.load(r + at, inside, 0.0), inside)
    tl.debug_barrier()  # the copy is there before anything in it is changed
    total = own * 0
    before = own * 0
    for start in range(0, k, block):
        number = start + tl.arange(0, block)
        near = tl.load(table + number, number < k, 0)
        mass = tl.load(r + near, number < k, 0.0)
        wide = mass.to(tl.float64)
        taken = (number < k) & (before + tl.cumsum(wide, 0) <= bound)
        total += tl.sum(tl.where(taken, wide, 0.0))
        before += tl.sum(wide)
        here = taken & (near >= first) & (near < first + part)
        tl.store(moved + near, tl.zeros_like(mass), here)
    tl.debug_barrier()
    if (y >= first) & (y < first + part):
        tl.store(moved + y, (own.to(r.dtype.element_ty) + total.to(r.dtype.element_ty)))
    if first == 0:
        tl.store(gain + row, total)
