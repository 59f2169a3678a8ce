"""Rotary positions and the KV cache's new slots in one launch: the step between a layer's QKV product and attention.

Pairs of numbers turn (RoFormer, Su et al. 2021, arXiv:2104.09864), in fp32. They are adjacent, as LlamaGen has it, or a
pair is number i of each half of the first 2 * `halves` numbers, and those behind are adjacent pairs, which turn by
nothing in models that rotate a part of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visar.kernels.backend import jit, tl, use_triton


def rotary_append(qkv: Tensor, table: Tensor, keys: Tensor, values: Tensor, slots: Tensor, halves: int = 0) -> Tensor:
    """Turn queries and keys, write keys and values into a layer's cache, and give the turned queries [R, W, H, D].

    `qkv` [R, W, H + 2K, D] has the heads of queries, of keys, then of values; `table` [R, W, D / 2, 2], fp32, is
    (cos, sin) for each pair; `keys` and `values` [R, S, K, D] are written at `slots` [R, W], int64, which differ within
    a row. The queries have the cache's dtype. `halves` of the pairs are number i of one and of the other half of the
    first 2 * `halves` numbers; with them the table turns the pairs behind by nothing. 0: all are adjacent.
    """
    form = rotary_append_triton if use_triton(qkv) else rotary_append_torch
    return form(qkv, table, keys, values, slots, halves)


def rotary_append_torch(
    qkv: Tensor, table: Tensor, keys: Tensor, values: Tensor, slots: Tensor, halves: int = 0
) -> Tensor:
    """`rotary_append` in plain torch, which is also what runs on a CPU."""
    shared, rows = keys.shape[2], torch.arange(len(slots), device=slots.device)[:, None]
    heads = qkv.shape[2] - 2 * shared
    turned = qkv[:, :, : heads + shared].to(torch.float32, copy=True)
    # A pair is a complex number, which on a CPU is faster than turning the two parts, and gives the same bits.
    angles = torch.view_as_complex(table).unsqueeze(2)
    if halves:
        one, two = turned[..., :halves], turned[..., halves : 2 * halves]
        pairs = torch.complex(one, two).mul_(angles[..., :halves])
        one.copy_(pairs.real)
        two.copy_(pairs.imag)
    else:
        torch.view_as_complex(turned.unflatten(-1, (-1, 2))).mul_(angles)
    q, k = turned.to(keys.dtype).split([heads, shared], dim=2)
    keys[rows, slots] = k
    values[rows, slots] = qkv[:, :, heads + shared :].to(values.dtype)
    return q


@jit
def _turn_and_write(  # type: ignore[no-untyped-def]
    out, qkv, table, keys, values, slots, queries, in_row, in_query, in_head, k_row, k_slot, k_head, v_row, v_slot,
    v_head, heads: tl.constexpr, shared: tl.constexpr, dim: tl.constexpr, halves: tl.constexpr, block_h: tl.constexpr,
    block_p: tl.constexpr,
):  # fmt: skip
    """One input of one row: a block of heads of its queries (`part` 0), keys (1) or values (2)."""
    line = tl.program_id(0).to(tl.int64)
    row, w = line // queries, line % queries
    part = tl.program_id(1)
    own = tl.where(part == 0, heads, shared)
    before = tl.where(part == 0, 0, heads + (part - 1) * shared)
    h = tl.program_id(2) * block_h + tl.arange(0, block_h)
    p = tl.arange(0, block_p)
    here = (h < own)[:, None] & (p < dim // 2)[None, :]
    one = tl.where(p < halves, p, 2 * p)[None, :]  # where the two numbers of a pair are
    two = tl.where(p < halves, p + halves, 2 * p + 1)[None, :]
    at = qkv + row * in_row + w * in_query + (before + h)[:, None].to(tl.int64) * in_head
    a, b = tl.load(at + one, here, 0.0).to(tl.float32), tl.load(at + two, here, 0.0).to(tl.float32)
    if part < 2:
        angle = table + line * dim + 2 * p
        cos, sin = tl.load(angle, p < dim // 2, 0.0)[None, :], tl.load(angle + 1, p < dim // 2, 0.0)[None, :]
        a, b = a * cos - b * sin, b * cos + a * sin
    slot = tl.load(slots + line)
    if part == 0:
        to = out + (line * heads + h)[:, None] * dim
    elif part == 1:
        to = keys + row * k_row + slot * k_slot + h[:, None].to(tl.int64) * k_head
    else:
        to = values + row * v_row + slot * v_slot + h[:, None].to(tl.int64) * v_head
    tl.store(to + one, a.to(out.dtype.element_ty), here)
    tl.store(to + two, b.to(out.dtype.element_ty), here)


def rotary_append_triton(
    qkv: Tensor, table: Tensor, keys: Tensor, values: Tensor, slots: Tensor, halves: int = 0
) -> Tensor:
    """`rotary_append` as one Triton launch; the cache may have any strides as long as D is contiguous."""
    rows, queries, every, dim = qkv.shape
    shared = keys.shape[2]
    heads = every - 2 * shared
    if any(t.stride(-1) != 1 for t in (qkv, keys, values)):
        raise ValueError("Queries, keys and values need contiguous heads.")
    out = torch.empty(rows, queries, heads, dim, dtype=keys.dtype, device=qkv.device)
    block_h, block_p = min(8, 1 << (heads - 1).bit_length()), 1 << (dim // 2 - 1).bit_length()
    _turn_and_write[(rows * queries, 3, -(-heads // block_h))](
        out, qkv, table.contiguous(), keys, values, slots.contiguous(), queries, *qkv.stride()[:3], *keys.stride()[:3],
        *values.stride()[:3], heads=heads, shared=shared, dim=dim, halves=halves, block_h=block_h, block_p=block_p,
    )  # fmt: skip
    return out
