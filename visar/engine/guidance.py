"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) with LlamaGen's interval, by absolute position."""

from __future__ import annotations

from dataclasses import dataclass

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

    def __post_init__(self) -> None:
        if not abs(self.scale) <= LARGEST:
            raise VisarError(f"The guidance scale must be from {-LARGEST:g} to {LARGEST:g}, not {self.scale}.")

    @property
    def active(self) -> bool:
        """Whether an unconditional batch is needed."""
        return self.scale != 1.0

    def over(self, position: int) -> bool:
        """Whether no token from this position on is guided."""
        return 0 <= self.interval < position - 1

    def combine(self, cond: Tensor, uncond: Tensor, positions: Tensor) -> Tensor:
        """Guided logits [B, W, V] for logits of both batches and the absolute positions [B, W] they predict."""
        return guide(cond, uncond, self.scale, None if self.interval < 0 else positions <= self.interval + 1)
