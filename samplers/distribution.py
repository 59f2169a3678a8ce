"""The target distribution, defined once: forced and allowed tokens -> temperature -> top-k -> top-p -> softmax in fp32.

Guidance comes before all of these; the Session applies it. AR samples from it, every verifier tests against it, and
residuals of it are never warped a second time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from visar.errors import VisarError
from visar.kernels.target_probs import target_probs


@dataclass(frozen=True)
class Target:
    """How logits become the target distribution.

    `allowed` [V], bool, are the tokens that free positions may have. `top_k` 0 is no limit, and ties with the k-th
    count as among them. `top_p` drops what comes after the token at which the cumulative probability passes it.
    `forced` [length], long, fixes the tokens at its non-negative entries, allowed or not.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    forced: Tensor | None = None
    allowed: Tensor | None = None

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
        """This target on a device; a `VisarError` if `forced` or `allowed` do not fit the sequence or vocabulary."""
        if self.forced is not None and (len(self.forced) != length or int(self.forced.max()) >= vocab):
            raise VisarError(f"forced must hold {length} entries, each -1 or a token below {vocab}.")
        if self.allowed is not None and (self.allowed.shape != (vocab,) or not bool(self.allowed.any())):
            raise VisarError(
                f"allowed must say of each of the {vocab} tokens whether it may be sampled, and of one yes."
            )
        there = {n: t.to(device) for n in ("forced", "allowed") if (t := getattr(self, n)) is not None}
        return replace(self, **there) if there else self

    def probs(self, logits: Tensor, positions: Tensor) -> Tensor:
        """The target distribution [B, W, V], fp32, for guided logits [B, W, V] at absolute positions [B, W]."""
        forced = None if self.forced is None else self.forced_at(positions)
        if self.allowed is not None:
            logits = torch.where(self.allowed, logits, -torch.inf)
        return target_probs(logits, self.temperature, self.top_k, self.top_p, forced)

    def forced_at(self, positions: Tensor) -> Tensor:
        """The forced tokens [B, W] at positions [B, W], -1 where the position is free."""
        if self.forced is None:
            return torch.full_like(positions, -1)
        return self.forced[positions.clamp_max(len(self.forced) - 1)]


class RowTargets:
    """A target of each row's own, in tensors that the kernels read; all rows have the same `allowed` tokens.

    A limit that no row has had so far is left out of the kernels.
    """

    def __init__(self, batch: int, length: int, device: torch.device, allowed: Tensor | None = None):
        self.temperature, self.top_p = (torch.ones(batch, device=device) for _ in range(2))
        self.top_k = torch.zeros(batch, dtype=torch.long, device=device)
        self.forced = torch.full((batch, length), -1, device=device)
        self.allowed = None if allowed is None else allowed.to(device)
        self._limited = self._nucleus = False

    def on(self, device: torch.device, length: int, vocab: int) -> RowTargets:
        """The targets themselves, which were made for this session."""
        return self

    def place(self, row: int, target: Target) -> bool:
        """Give a row this target; whether the kernels now read a setting that they have not read before."""
        before = self._limited, self._nucleus
        self.temperature[row], self.top_k[row], self.top_p[row] = target.temperature, target.top_k, target.top_p
        self.forced[row] = -1 if target.forced is None else target.forced
        self._limited |= target.top_k > 0
        self._nucleus |= target.top_p < 1
        return before != (self._limited, self._nucleus)

    def probs(self, logits: Tensor, positions: Tensor) -> Tensor:
        """As `Target.probs`."""
        if self.allowed is not None:
            logits = torch.where(self.allowed, logits, -torch.inf)
        top_k, top_p = self.top_k if self._limited else 0, self.top_p if self._nucleus else 1.0
        return target_probs(logits, self.temperature, top_k, top_p, self.forced_at(positions))

    def forced_at(self, positions: Tensor) -> Tensor:
        """As `Target.forced_at`."""
        return self.forced.gather(1, positions.clamp_max(self.forced.shape[1] - 1))
