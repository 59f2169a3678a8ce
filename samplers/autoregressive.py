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


@register_sampler("ar", paper="sequential sampling, the baseline")
@dataclass(frozen=True)
class Autoregressive(Registered):
    """One token per pass."""

    exact: ClassVar[bool] = True
    window: ClassVar[int] = 1

    def begin(self, session: Session, target: Target, noise: Noise) -> State:
        return State.empty(session, target, noise, 1)

    def step(self, session: Session, state: State) -> None:
        at = session.positions(1)
        p = state.target.probs(session.forward(state.inputs(session, 1)), at)
        tokens = sample(p, state.noise.uniforms(Purpose.STEP, at, state.passes)[1])
        state.commit(session, tokens, torch.zeros_like(session.lengths))
