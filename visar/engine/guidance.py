"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) with LlamaGen's interval, by absolute position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from visar.errors import VisarError
from visar.kernels.target_probs import guide
from visar.params import LARGEST


@dataclass(frozen=True)
class Guidance:
    """Logits u + scale (c - u). With `interval` >= 0 only the tokens 0..interval + 1 are guided, the rest use c.

    That off-by-one is the reference's: it counts decoding steps, and the first token is sampled before step 0.
    """

    scale: float = 1.0
    interval: int = -1
    grows: bool | Tensor = False  # whether the scale grows from 1 on, in sessions that do so; or of each row, [B]

    def __post_init__(self) -> None:
        if not abs(self.scale) <= LARGEST:
            raise VisarError(f"The guidance scale must be from {-LARGEST:g} to {LARGEST:g}, not {self.scale}.")

    @property
    def active(self) -> bool:
        """Whether an unconditional batch is needed."""
        return self.scale != 1.0

    @property
    def ends(self) -> bool:
        """Whether there are positions without guidance."""
        return self.interval >= 0

    def over(self, position: int) -> bool:
        """Whether no token from this position on is guided."""
        return 0 <= self.interval < position - 1

    def combine(self, cond: Tensor, uncond: Tensor, positions: Tensor) -> Tensor:
        """Guided logits [B, W, V] for logits of both batches and the absolute positions [B, W] they predict."""
        return guide(cond, uncond, self.scale, None if self.interval < 0 else positions <= self.interval + 1)


class RowGuidance(Guidance):
    """Guidance of each row's own: `scales` [B], fp32, and `intervals` [B]. Both batches run to the end."""

    active, ends = True, False  # type: ignore[assignment]

    def __init__(self, batch: int, device: torch.device):
        super().__init__()
        object.__setattr__(self, "scales", torch.ones(batch, device=device))
        object.__setattr__(self, "intervals", torch.full((batch,), -1, device=device))
        object.__setattr__(self, "grows", torch.zeros(batch, dtype=torch.bool, device=device))

    scales: Tensor
    intervals: Tensor
    grows: Tensor

    def place(self, row: int, guidance: Guidance) -> None:
        """Give a row this guidance."""
        self.scales[row], self.intervals[row], self.grows[row] = guidance.scale, guidance.interval, guidance.grows

    def select(self, rows: Tensor) -> None:
        """Row i has what the row `rows[i]` had."""
        for name in ("scales", "intervals", "grows"):
            object.__setattr__(self, name, getattr(self, name)[rows])

    def over(self, position: int) -> bool:
        return False

    def combine(self, cond: Tensor, uncond: Tensor, positions: Tensor) -> Tensor:
        own = self.intervals[:, None]
        # A row without guidance has the very logits of its conditional batch.
        guided = ((own < 0) | (positions <= own + 1)) & (self.scales != 1)[:, None]
        return guide(cond, uncond, self.scales, guided)
