"""What every sampler is: a frozen description, a state of static tensors, and a `step` without host control flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from visar.engine.rng import Noise, check_length
from visar.engine.session import Session
from visar.samplers.distribution import Target


@dataclass
class State:
    """A decoding in progress; samplers with more state have a subclass.

    `tokens` [B, N + W]: row b holds its committed tokens, then the drafts of its window. `commit_pass` [B, N + W]: the
    pass that committed each token. `passes` [B, 1]: each row's own, as rows may begin at different times; on the
    device, so that a captured graph counts by itself.
    """

    target: Target
    noise: Noise
    tokens: Tensor
    commit_pass: Tensor
    passes: Tensor

    @classmethod
    def empty(cls, session: Session, target: Target, noise: Noise, window: int, **own: Any) -> Self:
        """The state before the first pass; `own` are the fields of a subclass."""
        check_length(session.length, window)
        shape = (session.batch, session.length + window)
        return cls(
            target.on(session.device, session.length, session.vocab, session.cells),
            noise,
            tokens=torch.zeros(shape, dtype=torch.long, device=session.device),
            commit_pass=torch.full(shape, -1, dtype=torch.long, device=session.device),
            passes=torch.zeros(session.batch, 1, dtype=torch.long, device=session.device),
            **own,
        )

    def broken(self) -> bool:
        """Whether something that is no distribution was sampled from. The host waits for the device."""
        return self.target.broken()

    def check(self) -> None:
        """Raise `VisarError` where `broken`."""
        self.target.check()

    def inputs(self, session: Session, window: int) -> Tensor:
        """The tokens [B, W] of the next pass: the last committed one and the drafts."""
        return self.tokens.gather(1, (session.positions(window) - 1).clamp_min(0))

    def commit(self, session: Session, tokens: Tensor, accepted: Tensor) -> Tensor:
        """Write the window `tokens` [B, W], commit the first `accepted` + 1, and return the counts committed [B]."""
        window = tokens.shape[1]
        at = session.positions(window)
        count = torch.minimum(accepted + 1, session.length - session.lengths)
        self.tokens.scatter_(1, at, tokens)
        now = torch.arange(window, device=tokens.device) < count[:, None]
        self.commit_pass.scatter_(1, at, torch.where(now, self.passes, self.commit_pass.gather(1, at)))
        session.commit(count)
        self.passes += 1
        return count


class Sampler(Protocol):
    """`exact` says whether images have the distribution of sequential sampling; `window` is W, the inputs per pass.

    One whose host chooses something within a step says `capturable = False`, and is never made a CUDA graph.
    """

    @property
    def name(self) -> str: ...

    @property
    def exact(self) -> bool: ...

    @property
    def window(self) -> int: ...

    def begin(self, session: Session, target: Target, noise: Noise) -> Any:
        """The state that `step` works on, a `State`."""

    def step(self, session: Session, state: Any) -> None:
        """One pass: `session.forward`, then `state.commit`."""
