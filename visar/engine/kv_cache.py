"""The static KV cache, and attention through it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visar.models.llamagen import Attend
from visar.models.rotary import turned


class KVCache:
    """Static keys and values, [layers, rows, slots, heads, head_dim] each. Rolling back is overwriting."""

    def __init__(
        self, layers: int, rows: int, slots: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ):
        shape = (layers, rows, slots, heads, head_dim)
        # Zeros, not empty: a masked slot has weight 0, and 0 times what was in memory could be NaN.
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.rows = torch.arange(rows, device=device)[:, None]

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v [rows, W, heads, head_dim] at slots [rows, W]."""
        self.keys[layer, self.rows, slots] = k
        self.values[layer, self.rows, slots] = v

    def attend(self, slots: Tensor, mask: Tensor) -> Attend:
        """Attention of a pass written at `slots` [rows, W], of which `mask` [rows, W, visible] says what it sees."""
        visible = mask.shape[-1]
        mask = mask.unsqueeze(1)

        def attend(layer: int, qkv: Tensor, table: Tensor) -> Tensor:
            q, k, v = turned(qkv, table)
            self.write(layer, slots, k, v)
            k, v = self.keys[layer, :, :visible], self.values[layer, :, :visible]
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

        return attend

    def move(self, source: Tensor, to: Tensor) -> None:
        """Copy the slots `source` [rows, D] of all layers over the slots `to`; the two may overlap."""
        for cache in (self.keys, self.values):
            cache[:, self.rows, to] = cache[:, self.rows, source]

    @property
    def bytes_per_slot(self) -> int:
        """Bytes that one slot of one row takes over all layers."""
        layers, _, _, heads, dim = self.keys.shape
        return 2 * layers * heads * dim * self.keys.element_size()
