"""Layers with the parameters and keys of torch's own, which run on visar's kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visar.errors import VisarError
from visar.kernels.linear import epilogue, linear


def check_heads(dim: int, heads: int, multiple: int = 1) -> None:
    """Raise `VisarError` unless a width is that of so many heads, each a multiple of `multiple`."""
    if heads < 1 or dim % heads or dim // heads % multiple:
        each = f" of a multiple of {multiple} each" if multiple > 1 else ""
        raise VisarError(f"A width of {dim} cannot be split into {heads} heads{each}.")


class Linear(nn.Linear):
    """`torch.nn.Linear`, which on a CPU stores its weight in the order that the processor reads."""

    fuses = True  # takes what follows the product

    def forward(  # type: ignore[override]
        self, x: Tensor, *, silu: bool = False, times: Tensor | None = None, plus: Tensor | None = None
    ) -> Tensor:
        """x [..., K] -> [..., N]; then optionally SiLU, a factor `times` and a summand `plus`, [..., N] each."""
        return linear(x, self.weight, self.bias, silu=silu, times=times, plus=plus)


def run_linear(layer: nn.Module, x: Tensor, **after: Any) -> Tensor:
    """A layer with what follows it; one of another class, such as an adapter of your own, is called without it."""
    if getattr(layer, "fuses", False):
        return layer(x, **after)  # type: ignore[no-any-return]
    return epilogue(layer(x), **after)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # In training a drafter has weights of more bits than the target's features.
        x = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
