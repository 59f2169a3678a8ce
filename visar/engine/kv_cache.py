"""The static KV cache, and attention through it."""

from __future__ import annotations

import torch
from torch import Tensor

from visar.engine.decoder import Attend
from visar.kernels.attention import AttentionMetadata, decode_attention, masked_attention
from visar.kernels.backend import use_triton
from visar.kernels.invariant import is_invariant
from visar.kernels.rotary_append import rotary_append


class KVCache:
    """Static keys and values, [layers, rows, slots, heads, head_dim] each. Rolling back is overwriting.

    `heads` are those of keys and values, which several heads of queries may share.

    In memory the slots of one head are contiguous. On a CPU the cache is fp32 whatever the model is, because
    attention of one token in bfloat16 takes twice as long there, and float64 in the invariant mode.
    """

    def __init__(
        self, layers: int, rows: int, slots: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ):
        shape = (layers, rows, heads, slots, head_dim)
        if device.type == "cpu":
            summed = is_invariant() and not use_triton(torch.empty(0))  # by `masked_attention`, in float64
            dtype = torch.float64 if summed else torch.float32
        # Zeros, not empty: a masked slot has weight 0, and 0 times what was in memory could be NaN.
        self._room = tuple(torch.zeros(shape, dtype=dtype, device=device).transpose(2, 3) for _ in range(2))
        self.keys, self.values = self._room
        self.rows = torch.arange(rows, device=device)[:, None]

    def attend(self, slots: Tensor, mask: AttentionMetadata | Tensor, visible: int, halves: int = 0) -> Attend:
        """Attention of a pass written at `slots` [rows, W], which reads the first `visible` slots.

        `mask` is an `AttentionMetadata`, or a tensor [rows, W, visible], bool or added to the logits; `halves` says
        which pairs turn, as in `rotary_append`. Rows of `qkv` may be repeated, as `visar.kernels.linear.repeats` says.
        """
        rows = len(slots)

        def attend(layer: int, qkv: Tensor, table: Tensor) -> Tensor:
            k, v, own = self.keys[layer], self.values[layer], qkv if len(qkv) == rows else qkv[:rows]
            q = rotary_append(own, table, k, v, slots, halves)
            if isinstance(mask, AttentionMetadata):
                out = decode_attention(q, k, v, mask, visible)
            else:
                bias = mask if mask.dtype == torch.bool else mask.to(q.dtype)
                out = masked_attention(q, k[:, :visible], v[:, :visible], bias)
            if own is qkv:
                return out.to(qkv.dtype)
            times = len(qkv) // rows
            return qkv.new_empty(times, *out.shape).copy_(out).flatten(0, 1)

        return attend

    def write(self, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Write keys and values [rows, W, heads, head_dim] of a layer, which are rotated already, at `slots`."""
        self.keys[layer][self.rows, slots] = keys.to(self.keys.dtype)
        self.values[layer][self.rows, slots] = values.to(self.values.dtype)

    def move(self, source: Tensor, to: Tensor) -> None:
        """Copy the slots `source` [rows, D] of all layers to the slots `to`; the two may overlap."""
        for cache in (self.keys, self.values):
            cache[:, self.rows, to] = cache[:, self.rows, source]

    def place(self, rows: Tensor, fresh: KVCache) -> None:
        """Replace the `rows` [R] by those of a cache of R rows, empty slots too."""
        self.keys[:, rows], self.values[:, rows] = fresh.keys, fresh.values

    def select(self, rows: Tensor) -> None:
        """Row i becomes what the row `rows[i]` was, in place; there is room for as many rows as at the beginning."""
        to = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        for cache in self._room:
            for layer in cache:  # one after the other, as what moves is copied twice
                layer[to] = layer[rows[to]]
        self.keys, self.values = (cache[:, : len(rows)] for cache in self._room)
        self.rows = torch.arange(len(rows), device=rows.device)[:, None]

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of one slot of one row over all layers."""
        layers, _, _, heads, dim = self.keys.shape
        return 2 * layers * heads * dim * self.keys.element_size()
