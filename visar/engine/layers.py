"""Layers with the parameters and keys of torch's own, which run on visar's kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visar.kernels.linear import linear


class Linear(nn.Linear):
    """`torch.nn.Linear`, which on a CPU stores its weight in the order that the processor reads."""

    def forward(  # type: ignore[override]
        self, x: Tensor, *, silu: bool = False, times: Tensor | None = None, plus: Tensor | None = None
    ) -> Tensor:
        """x [..., K] -> [..., N]; then optionally SiLU, a factor `times` and a summand `plus`, [..., N] each."""
        return linear(x, self.weight, self.bias, silu=silu, times=times, plus=plus)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # In training a drafter has weights of more bits than the target's features.
        x = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
