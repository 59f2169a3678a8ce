"""The target distribution, defined once: forced tokens -> temperature -> top-k -> top-p -> softmax in fp32.

Guidance comes before all of these; the Session applies it. AR samples from this law, every verifier tests against it,
and residuals of it are never warped a second time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from visar.errors import VisarError
from visar.kernels.law import law


@dataclass(frozen=True)
class Target:
    """How logits become the law that is sampled.

    `top_k` 0 keeps all tokens; ties with the k-th are kept. `top_p` drops what comes after the token at which the
    cumulative probability passes it. `forced` [length], long, fixes the tokens at its non-negative entries.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    forced: Tensor | None = None

    def __post_init__(self) -> None:
        if not 1e-5 <= self.temperature < math.inf:
            raise VisarError(
                f"Temperature must be a number above 0 (1e-5 at least), not {self.temperature}; for greedy decoding "
                "use top_k 1."
            )
        if self.top_k < 0:
            raise VisarError(f"top_k must be 0 (all tokens) or above, not {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise VisarError(f"top_p must be above 0 and at most 1, not {self.top_p}.")

    def on(self, device: torch.device, length: int, vocab: int) -> Target:
        """This target with `forced` on a device; a `VisarError` if it does not fit the sequence or the vocabulary."""
        if self.forced is None:
            return self
        if len(self.forced) != length or int(self.forced.max()) >= vocab:
            raise VisarError(f"forced must hold {length} entries, each -1 or a token below {vocab}.")
        return replace(self, forced=self.forced.to(device))

    def probs(self, logits: Tensor, positions: Tensor) -> Tensor:
        """The law [B, W, V], fp32, for guided logits [B, W, V] at absolute positions [B, W]."""
        forced = None if self.forced is None else self.forced_at(positions)
        return law(logits, self.temperature, self.top_k, self.top_p, forced)

    def forced_at(self, positions: Tensor) -> Tensor:
        """The forced tokens [B, W] at positions [B, W], -1 where the position is free."""
        if self.forced is None:
            return torch.full_like(positions, -1)
        return self.forced[positions.clamp_max(len(self.forced) - 1)]
