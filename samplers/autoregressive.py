"""Plain autoregressive decoding: the same engine with W = 1, and so the only fair baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visar.engine.rng import Noise, Purpose
from visar.engine.session import Session
from visar.samplers.base import State
from visar.samplers.distribution import Target
from visar.samplers.registry import Registered, register_sampler
from visar.samplers.verification import sample


@dataclass
class SequentialState(State):
    """`width` is the most tokens that a pass commits: 1, or 3 where tokens may be forced."""

    width: int


def forced_next(session: Session, state: SequentialState) -> bool:
    """Whether the next token of some row is forced. On a GPU, where looking would wait, whether any may be."""
    if state.width == 1 or session.device.type != "cpu":
        return state.width > 1
    forced = state.target.forced_at(session.positions(1))[:, 0] >= 0
    return bool((forced & (session.lengths < session.length)).any())


@register_sampler("ar", paper="sequential sampling, the baseline")
@dataclass(frozen=True)
class Autoregressive(Registered):
    """One token per pass, and no pass of its own for a forced one, which is fed together with the token before it; of
    several in a row a pass commits two.

    The noise of a position does not depend on how many passes came before.
    """

    exact: ClassVar[bool] = True
    window: ClassVar[int] = 1

    def begin(self, session: Session, target: Target, noise: Noise) -> SequentialState:
        width = 1 if target.forced is None or session.window < 2 else 3
        return SequentialState.empty(session, target, noise, width, width=width)

    def step(self, session: Session, state: SequentialState) -> None:
        inputs, accepted, forced_at = (
            state.inputs(session, 1),
            torch.zeros_like(session.lengths),
            state.target.forced_at,
        )
        if forced_next(session, state):
            known = forced_at(session.positions(1))
            inputs, accepted = torch.cat([inputs, known.clamp_min(0)], dim=1), (known[:, 0] >= 0).long()
        at = session.positions(inputs.shape[1])
        p = state.target.probs(session.forward(inputs), at)
        tokens = sample(p, state.noise.uniforms(Purpose.STEP, at, at)[1])
        if state.width > 1:  # nothing follows the last token, so where it is forced it is not fed at all
            last = forced_at(torch.full_like(at[:, :1], session.length - 1))
            tokens = torch.cat([tokens, last], dim=1)
            ends = session.lengths + accepted + 2 == session.length
            accepted = accepted + (ends & (last[:, 0] >= 0)).long()
        state.commit(session, tokens, accepted)
