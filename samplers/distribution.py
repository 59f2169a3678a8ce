"""The target distribution, defined once: forced and allowed tokens -> temperature -> top-k -> top-p -> softmax in fp32.

Guidance comes before all of these; the Session applies it. AR samples from it, every verifier tests against it, and
residuals of it are never warped a second time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from visar.errors import NoDistribution, VisarError
from visar.kernels.target_probs import target_probs
from visar.params import LARGEST, LEAST_TEMPERATURE, as_tokens, number, whole

OFF = 0.01  # how far from 1 rounding may leave the sum of a distribution


@dataclass(frozen=True)
class Target:
    """How logits become the target distribution.

    `allowed` [V], bool, are the tokens that free positions may have. `top_k` 0 is no limit, and ties with the k-th
    count as among them. `top_p` drops what comes after the token at which the cumulative probability passes it.
    `forced` [length], whole numbers, fixes tokens, allowed or not; it is -1 where the position is free.

    On a device (`on`), `faults` [2] remembers how far the worst sum of any distribution was from 1: of the target's and
    of the drafter's. NaN means that there was one that is none. The host reads it in `broken` and `check`.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    forced: Tensor | None = None
    allowed: Tensor | None = None
    faults: Tensor | None = field(default=None, compare=False, repr=False)
    length: int = field(default=0, compare=False, repr=False)  # positions from here on are never committed
    cells: Tensor | None = field(default=None, compare=False, repr=False)  # [B, N], as in a `Session`

    def __post_init__(self) -> None:
        for name, read in (("top_k", whole), ("temperature", number), ("top_p", number)):
            if (value := read(name, getattr(self, name))) is None:
                raise VisarError(f"{name} must be a number, not None.")
            object.__setattr__(self, name, value)
        if self.forced is not None:
            object.__setattr__(self, "forced", as_tokens(self.forced))
        if not LEAST_TEMPERATURE <= self.temperature <= LARGEST:
            raise VisarError(
                f"Temperature must be a number above 0 ({LEAST_TEMPERATURE:g} at least, {LARGEST:g} at most), "
                f"not {self.temperature}; for greedy decoding use top_k 1."
            )
        if self.top_k < 0:
            raise VisarError(f"top_k must be 0 (all tokens) or above, not {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise VisarError(f"top_p must be above 0 and at most 1, not {self.top_p}.")

    def on(self, device: torch.device, length: int, vocab: int, cells: Tensor | None = None) -> Target:
        """This target on a device; a `VisarError` if `forced` or `allowed` do not fit the sequence or vocabulary."""
        forced = None if self.forced is None else self.forced.long()
        if forced is not None and not (
            self.forced is not None
            and is_whole(self.forced)
            and tuple(forced.shape) == (length,)
            and bool(((forced >= -1) & (forced < vocab)).all())
        ):
            raise VisarError(f"forced must hold {length} entries, each -1 or a token below {vocab}.")
        if self.allowed is not None and (self.allowed.shape != (vocab,) or not bool(self.allowed.any())):
            raise VisarError(
                f"allowed must say of each of the {vocab} tokens whether it may be sampled, and of one yes."
            )
        return replace(
            self,
            forced=None if forced is None else forced.to(device, torch.long),
            allowed=None if self.allowed is None else self.allowed.to(device),
            faults=torch.zeros(2, device=device),
            length=length,
            cells=cells,
        )

    def probs(self, logits: Tensor, positions: Tensor, drafted: bool = False) -> Tensor:
        """The target distribution [B, W, V], fp32, for guided logits [B, W, V] at absolute positions [B, W].

        `drafted`: the logits are a drafter's, to which the same settings apply.
        """
        forced = None if self.forced is None else self.forced_at(positions)
        if self.allowed is not None:
            logits = torch.where(self.allowed, logits, -torch.inf)
        p = target_probs(logits, self.temperature, self.top_k, self.top_p, forced)
        if self.faults is not None:
            note_faults(self.faults[int(drafted)], p, positions, self.length)
        return p

    def broken(self) -> bool:
        """Whether a distribution so far was none. The host waits for the device."""
        return self.faults is not None and not bool((self.faults < OFF).all())

    def check(self) -> None:
        """Raise `VisarError` if a distribution so far was none: it would have been sampled from all the same."""
        if self.faults is None or not self.broken():
            return
        target, _ = (self.faults < OFF).tolist()
        if target:
            raise VisarError("The drafter gave no distribution: its logits are not finite, so its weights are damaged.")
        raise NoDistribution(
            "The model gave no distribution: its logits are not finite in float32, or too large for the guidance scale "
            f"and temperature {self.temperature:g}, or no token was allowed at a position."
        )

    def forced_at(self, positions: Tensor) -> Tensor:
        """The forced tokens [B, W] at positions [B, W], -1 where the position is free."""
        if self.forced is None:
            return torch.full_like(positions, -1)
        return self.forced[cells_at(self.cells, positions.clamp_max(len(self.forced) - 1))]


def note_faults(worst: Tensor, p: Tensor, positions: Tensor, length: int) -> None:
    """Note in `worst`, one number or [B], how far from 1 the sum of a distribution p [B, W, V] is."""
    off = (p.detach().sum(-1) - 1).abs().masked_fill(positions >= length, 0)
    torch.maximum(worst, off.amax(1) if worst.ndim else off.amax(), out=worst)


def cells_at(cells: Tensor | None, positions: Tensor) -> Tensor:
    """The cells [B, W] of positions [B, W] that there are, by the `cells` [B, N] of a session."""
    return positions if cells is None else cells.gather(1, positions)


def is_whole(tokens: Tensor) -> bool:
    """Whether a tensor has a dtype of whole numbers; truth values are none."""
    return not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)


class RowTargets:
    """A target of each row's own, in tensors that the kernels read; all rows have the same `allowed` tokens.

    A limit that no row has had so far is left out of the kernels. `faults` [2, B] are those of each row.
    """

    def __init__(self, batch: int, length: int, device: torch.device, allowed: Tensor | None = None):
        self.temperature, self.top_p = (torch.ones(batch, device=device) for _ in range(2))
        self.top_k = torch.zeros(batch, dtype=torch.long, device=device)
        self.forced = torch.full((batch, length), -1, device=device)
        self.allowed = None if allowed is None else allowed.to(device)
        self.faults = torch.zeros(2, batch, device=device)
        self._limited = self._nucleus = False
        self.cells: Tensor | None = None

    def on(self, device: torch.device, length: int, vocab: int, cells: Tensor | None = None) -> RowTargets:
        """The targets themselves, which were made for this session."""
        self.cells = cells
        return self

    def place(self, row: int, target: Target) -> bool:
        """Give a row this target; whether the kernels now read a setting that they have not read before."""
        before = self._limited, self._nucleus
        self.temperature[row], self.top_p[row] = target.temperature, target.top_p
        self.top_k[row] = min(target.top_k, 2**31 - 1)  # of all there are, and no more fit the tensor
        self.forced[row] = -1 if target.forced is None else target.forced
        self.faults[:, row] = 0
        self._limited |= target.top_k > 0
        self._nucleus |= target.top_p < 1
        return before != (self._limited, self._nucleus)

    def select(self, rows: Tensor) -> None:
        """Row i has what the row `rows[i]` had."""
        for name in ("temperature", "top_k", "top_p", "forced"):
            setattr(self, name, getattr(self, name)[rows])
        self.faults = self.faults[:, rows]

    def probs(self, logits: Tensor, positions: Tensor, drafted: bool = False) -> Tensor:
        """As `Target.probs`."""
        if self.allowed is not None:
            logits = torch.where(self.allowed, logits, -torch.inf)
        top_k, top_p = self.top_k if self._limited else 0, self.top_p if self._nucleus else 1.0
        p = target_probs(logits, self.temperature, top_k, top_p, self.forced_at(positions))
        note_faults(self.faults[int(drafted)], p, positions, self.forced.shape[1])
        return p

    def sound(self) -> Tensor:
        """The rows [B] whose distributions so far were all distributions."""
        return (self.faults < OFF).all(0)

    def forced_at(self, positions: Tensor) -> Tensor:
        """As `Target.forced_at`."""
        return self.forced.gather(1, cells_at(self.cells, positions.clamp_max(self.forced.shape[1] - 1)))
