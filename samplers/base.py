"""What every sampler is: a frozen description, a state of static tensors, and a `step` without host control flow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from visar.engine.rng import Noise
from visar.engine.session import Session
from visar.engine.tree import Tree
from visar.samplers.distribution import Target

if TYPE_CHECKING:
    from visar.samplers.tree_verification import ChildRule


@dataclass
class State:
    """A decoding in progress.

    `tokens` [B, N + W]: row b holds its committed tokens, then the drafts of its window. `laws` [B, W-1, V]: the laws
    that the drafts were drawn from. `commit_pass` [B, N + W]: the pass that committed each token. `passes`: a scalar
    on the device, so that a captured graph counts by itself.
    """

    target: Target
    noise: Noise
    tokens: Tensor
    laws: Tensor | None
    commit_pass: Tensor
    passes: Tensor
    tree: Tree | None = None  # of samplers that draft one: its nodes, and
    children: Tensor | None = None  # [1, T, C] the children of each, -1 behind the last
    below: list[Tensor] = field(default_factory=list)  # the same, one tensor for each node
    rule: ChildRule | None = None
    turn: int = 0  # of samplers whose schedule is fixed: the passes so far
    seen: Tensor | None = None  # [2, B, levels]: drafts tested and drafts accepted, by the entropy of their laws

    @staticmethod
    def empty(session: Session, target: Target, noise: Noise, window: int) -> State:
        shape = (session.batch, session.length + window)
        return State(
            target.on(session.device, session.length, session.vocab),
            noise,
            tokens=torch.zeros(shape, dtype=torch.long, device=session.device),
            laws=None,
            commit_pass=torch.full(shape, -1, dtype=torch.long, device=session.device),
            passes=torch.zeros((), dtype=torch.long, device=session.device),
        )

    def inputs(self, session: Session, window: int) -> Tensor:
        """The tokens [B, W] of the next pass: the last committed one and the drafts."""
        return self.tokens.gather(1, (session.positions(window) - 1).clamp_min(0))

    def commit(self, session: Session, tokens: Tensor, accepted: Tensor) -> Tensor:
        """Write the window `tokens` [B, W], keep the first `accepted` + 1 of them, and return the counts kept [B]."""
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
    """`exact` says whether the images have the law of sequential sampling; `window` is W, the inputs per pass.

    One whose host decides something within a step says `capturable = False`, and is never made a CUDA graph.
    """

    @property
    def name(self) -> str: ...

    @property
    def exact(self) -> bool: ...

    @property
    def window(self) -> int: ...

    def begin(self, session: Session, target: Target, noise: Noise) -> State: ...

    def step(self, session: Session, state: State) -> None: ...
