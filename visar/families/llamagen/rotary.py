"""LlamaGen's 2-D rotary position table, with its zeroed condition slots."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(condition_length: int, grid: int, head_dim: int, base: float = 10000.0) -> Tensor:
    """Table [condition_length + grid**2, head_dim / 2, 2] of (cos, sin), fp32, indexed by input position.

    The first half of the pairs rotates by the row, the second by the column. The condition rows are zero in *both*
    cos and sin, so the queries and keys of condition tokens vanish. The published weights were trained so; an identity
    rotation there gives wrong images.
    """
    quarter = head_dim // 4
    frequencies = base ** (-torch.arange(quarter, dtype=torch.float32) * 2 / (head_dim // 2))
    cells = torch.arange(grid * grid)
    angles = torch.cat([torch.outer(cells // grid, frequencies), torch.outer(cells % grid, frequencies)], dim=1)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([table.new_zeros(condition_length, *table.shape[1:]), table])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate *adjacent* pairs of x [..., W, heads, head_dim] by the rows `table` [..., W, head_dim / 2, 2], in fp32."""
    cos, sin = table.unsqueeze(-3).unbind(-1)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


def turned(qkv: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each [..., W, heads, head_dim], of qkv [..., W, 3 * heads, head_dim]; q and k rotated by `table`."""
    heads = qkv.shape[-2] // 3
    q, k = rotate(qkv[..., : 2 * heads, :], table).chunk(2, dim=-2)  # one rotation for both
    return q, k, qkv[..., 2 * heads :, :]
