"""The interface of a transformer over image tokens: its layers, and the arithmetic of one pass."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# (layer, qkv [B, W, heads of queries, keys and values, head_dim], table) -> attention output [B, W, heads, head_dim].
# It rotates q and k by the rotary rows `table`, so that a KV cache can rotate and write them in one kernel.
Attend = Callable[[int, Tensor, Tensor], Tensor]


class Decoder(Protocol):
    """A stack of `layers` between the embedding of V tokens and an output head, `dim` wide.

    `config` names at least `vocab_size`, `dim`, `num_layers`, `num_heads` and `ffn`, and `num_kv_heads` where heads of
    queries share those of keys and values.
    """

    config: Any
    tok_embeddings: nn.Embedding
    layers: nn.ModuleList
    norm: Any  # a module [dim] -> [dim]
    output: Any  # a linear layer [dim, V]

    @property
    def head_dim(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def run(self, x: Tensor, table: Tensor, attend: Attend, aux_layers: Collection[int] = ()) -> Tensor:
        """Normed hidden states [B, W, dim] for embeddings x [B, W, dim] at the rotary rows `table`.

        The outputs of the layers `aux_layers`, if any, are appended: [B, W, dim * (1 + n)].
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [B, W, V], fp32, of the output of `run`; auxiliary hidden states are ignored."""
        ...


def kv_heads(config: Any) -> int:
    """The heads of keys and values of a decoder."""
    return int(getattr(config, "num_kv_heads", None) or config.num_heads)
