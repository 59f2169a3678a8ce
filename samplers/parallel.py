"""The cells of a group in one pass, each independently of the others, for models that sample in any order."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from visar.engine.layout import Layout
from visar.engine.orders import group_sizes
from visar.engine.rng import Noise, Purpose
from visar.engine.session import Session
from visar.errors import VisarError
from visar.samplers.base import State
from visar.samplers.distribution import Target
from visar.samplers.parameters import option
from visar.samplers.registry import Registered, register_sampler
from visar.samplers.verification import sample


@dataclass
class GroupState(State):
    """`count`, `before` [N + 1]: after so many tokens the sizes of the group to sample and of the one before; 0 where
    none begins."""

    count: Tensor
    before: Tensor


@register_sampler("parallel", paper="LPD, Zhang et al. 2025, arXiv:2507.01957; RandAR, arXiv:2412.01827", exact=False)
@dataclass(frozen=True)
class Parallel(Registered):
    """Parallel decoding of RandAR and LPD: groups of cells that grow by a cosine, one in each pass.

    Relaxed: given the groups before, the cells of one are sampled independently of each other. With as many steps as
    cells it is plain decoding.
    """

    steps: int = option(20, "groups of cells, one in each pass", 1, 4096)
    layout: Layout | None = field(default=None, compare=False)  # filled in by the model
    exact: ClassVar[bool] = False
    scan: ClassVar[str] = "groups"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise VisarError(f"steps must be 1 or more, not {self.steps}.")

    @cached_property
    def sizes(self) -> list[int]:
        """Cells of each group."""
        return [1] if self.layout is None else group_sizes(self.layout.length, self.steps)

    @property
    def window(self) -> int:
        """The most tokens that a pass samples."""
        return max(self.sizes)

    def begin(self, session: Session, target: Target, noise: Noise) -> GroupState:
        if self.layout is None or self.layout.length != session.length:
            raise VisarError(f"parallel needs layout, the rows and columns of an image of {session.length} cells.")
        starts = [0, *accumulate(self.sizes)][:-1]
        count, before = torch.zeros(2, session.length + 1, dtype=torch.long)
        count[starts], before[starts] = torch.tensor(self.sizes), torch.tensor([1, *self.sizes[:-1]])
        moved = {"count": count.to(session.device), "before": before.to(session.device)}
        return GroupState.empty(session, target, noise, self.window, **moved)

    def step(self, session: Session, state: GroupState) -> None:
        count, before = state.count[session.lengths], state.before[session.lengths]
        window = torch.arange(self.window, device=session.device)
        fed = (session.lengths - before)[:, None] + window
        at = torch.where(window < count[:, None], session.lengths[:, None] + window, session.length)
        logits = session.forward_group(state.tokens.gather(1, fed.clamp_min(0)), before, count)
        tokens = self.sampled(state.target.probs(logits, at), at, state)
        state.tokens.scatter_(1, at, tokens)
        state.commit_pass.scatter_(1, at, state.passes.expand_as(at))
        state.passes += 1
        session.commit(count)

    def sampled(self, p: Tensor, at: Tensor, state: GroupState) -> Tensor:
        """Tokens [B, W] of distributions p [B, W, V] at positions [B, W]."""
        return sample(p, state.noise.uniforms(Purpose.STEP, at, at)[1])
