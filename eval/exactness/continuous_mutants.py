"""Known-bad samplers of continuous tokens: `visar verify` must reject every one of them.

Most mistakes are in published code; the table says where each shows. Those of noise alone are made by noise that is
wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from visar.engine.masked_session import MaskedSession
from visar.engine.rng import Noise, Purpose
from visar.eval.exactness.head_mutants import (
    DraftStd,
    Mirrored,
    NormalAsUniform,
    NoTruncation,
    OneBank,
    StaleGuidance,
    StepFromTarget,
    Untested,
    retold,
)
from visar.samplers import ContinuousSpeculative, ContinuousTarget
from visar.samplers.gaussian import Gaussian, log_ratio
from visar.samplers.masked import MaskedState

PUBLISHED_TRIALS = 100
EXACT: dict[str, Any] = {"factor": False, "nested": True, "prefill": 0.0}


class WrongNoise(Noise):
    """Noise with a mistake, which its parts `of` rows have too."""

    @classmethod
    def like(cls, noise: Noise) -> Self:
        made = cls(0, noise.images, noise.keys)
        made.key = noise.key
        return made


class OnePosition(WrongNoise):
    """The noise of all head steps is that of the first position."""

    def normals(
        self, purpose: Purpose, positions: Tensor, passes: Tensor | int, dim: int, trial: Tensor | int = 0
    ) -> Tensor:
        shared = purpose in (Purpose.SHARED, Purpose.INIT)
        return super().normals(purpose, torch.zeros_like(positions) if shared else positions, passes, dim, trial)


class NoDraftNoise(WrongNoise):
    """Drafts are the means of their distributions; what replaces a rejected one is sampled."""

    def normals(
        self, purpose: Purpose, positions: Tensor, passes: Tensor | int, dim: int, trial: Tensor | int = 0
    ) -> Tensor:
        return super().normals(purpose, positions, passes, dim, trial) * (purpose != Purpose.DRAFT)


class DraftNormalAsUniform(WrongNoise):
    """The uniform of a draft is a function of the normal that sampled it."""

    def uniforms(
        self, purpose: Purpose, positions: Tensor, passes: Tensor | int, trial: Tensor | int = 0
    ) -> tuple[Tensor, Tensor]:
        if purpose != Purpose.STEP:
            return super().uniforms(purpose, positions, passes, trial)
        u = torch.special.ndtr(self.normals(Purpose.DRAFT, positions, passes, 1)[..., 0].double())
        return u, u


@dataclass(frozen=True)
class WithNoise(ContinuousSpeculative):
    """The exact sampler with noise of the given kind."""

    kind: type[WrongNoise] = WrongNoise

    def begin(self, session: MaskedSession, target: ContinuousTarget, noise: Noise) -> MaskedState:
        return super().begin(session, target, self.kind.like(noise))


@dataclass(frozen=True)
class OneScale(ContinuousSpeculative):
    """All drafts of a window are judged with the guidance scale of its last."""

    def begin(self, session: MaskedSession, target: ContinuousTarget, noise: Noise) -> MaskedState:
        def last(told: Tensor, known: Tensor) -> Tensor:
            window = told.view(session.batch, -1)
            return window.amax(1, keepdim=True).expand_as(window).reshape(told.shape)

        retold(session, last)
        return super().begin(session, target, noise)


@dataclass(frozen=True)
class InvertedFactor(ContinuousSpeculative):
    """The published factor upside down, as released."""

    def _accepts(self, drafts: Tensor, p: Gaussian, q: Gaussian, log_factor: Tensor | None, uniforms: Tensor) -> Tensor:
        assert log_factor is not None
        return super()._accepts(drafts, p, q, -log_factor, uniforms)

    def _replacement(
        self, drafts: Tensor, p: Gaussian, q: Gaussian, log_factor: Tensor | None, wrong: Tensor, ask: Tensor,
        state: MaskedState, turn: int,
    ) -> Tensor:  # fmt: skip
        assert log_factor is not None
        return super()._replacement(drafts, p, q, -log_factor, wrong, ask, state, turn)


@dataclass(frozen=True)
class Tempered(ContinuousSpeculative):
    """Tests with both standard deviations times 2, and the right residual; the release has 42."""

    def _accepts(self, drafts: Tensor, p: Gaussian, q: Gaussian, log_factor: Tensor | None, uniforms: Tensor) -> Tensor:
        return super()._accepts(drafts, Gaussian(p.mean, 2 * p.std), Gaussian(q.mean, 2 * q.std), log_factor, uniforms)


@dataclass(frozen=True)
class FromTarget(ContinuousSpeculative):
    """A rejected draft is replaced by a sample from P."""

    def _replacement(
        self, drafts: Tensor, p: Gaussian, q: Gaussian, log_factor: Tensor | None, wrong: Tensor, ask: Tensor,
        state: MaskedState, turn: int,
    ) -> Tensor:  # fmt: skip
        normals = state.noise.normals(Purpose.RESIDUAL, ask, turn, drafts.shape[-1])
        return p.sample(normals)[wrong]


@dataclass(frozen=True)
class Capped(ContinuousSpeculative):
    """After 100 trials of the residual a token is left at zero."""

    def _replacement(
        self, drafts: Tensor, p: Gaussian, q: Gaussian, log_factor: Tensor | None, wrong: Tensor, ask: Tensor,
        state: MaskedState, turn: int,
    ) -> Tensor:  # fmt: skip
        x, some = self._tried(p.at(wrong), q.at(wrong), wrong, ask, state, turn)  # type: ignore[arg-type]
        return x * some[:, None]

    def _tried(
        self, p: Gaussian, q: Gaussian, wrong: Tensor, ask: Tensor, state: MaskedState, turn: int
    ) -> tuple[Tensor, Tensor]:
        """What the first trial gave that was taken, [R, d], and whether one was, [R]."""
        number = torch.arange(PUBLISHED_TRIALS)
        positions, noise = ask[wrong][:, None].expand(-1, len(number)), state.noise.of(wrong.nonzero()[:, 0])
        one, other = (Gaussian(gaussian.mean[:, None], gaussian.std[:, None]) for gaussian in (p, q))
        x = one.sample(noise.normals(Purpose.RESIDUAL, positions, turn, p.mean.shape[-1], number))
        taken = self._uniforms(noise, positions, turn, number) < -torch.expm1(-log_ratio(x, one, other))
        return x[torch.arange(len(x)), taken.int().argmax(1)], taken.any(1)

    def _uniforms(self, noise: Noise, positions: Tensor, turn: int, number: Tensor) -> Tensor:
        return noise.uniforms(Purpose.ORDER, positions, turn, number)[0]


@dataclass(frozen=True)
class UniformAsTrial(Capped):
    """The uniform that rejected a draft is that of all trials of the residual; after 100, a sample from P."""

    def _replacement(
        self, drafts: Tensor, p: Gaussian, q: Gaussian, log_factor: Tensor | None, wrong: Tensor, ask: Tensor,
        state: MaskedState, turn: int,
    ) -> Tensor:  # fmt: skip
        return self._tried(p.at(wrong), q.at(wrong), wrong, ask, state, turn)[0]  # type: ignore[arg-type]

    def _uniforms(self, noise: Noise, positions: Tensor, turn: int, number: Tensor) -> Tensor:
        return noise.uniforms(Purpose.STEP, positions, turn)[0]


class Mutant(NamedTuple):
    """A wrong sampler and the case of `visar.eval.exactness.continuous` in which it shows."""

    name: str
    sampler: Any
    case: str


MUTANTS = (
    Mutant("mar: guidance a pass late", StaleGuidance(), "guidance 2.5, linear"),
    Mutant("mar: one noise bank", OneBank(), "plain"),
    Mutant("head: untested", Untested(), "plain"),
    Mutant("head: no truncation", NoTruncation(), "L 5, T 12"),
    Mutant("head: draft's std", DraftStd(), "moving variance"),
    Mutant("head: wrong reflection", Mirrored(), "moving variance"),
    Mutant("head: residual is p", StepFromTarget(), "plain"),
    Mutant("head: uniform reused", NormalAsUniform(), "plain"),
    Mutant("cspd: Sigma alone", ContinuousSpeculative(**EXACT | {"factor": True}), "plain"),
    Mutant("cspd: Sigma inverted", InvertedFactor(**EXACT | {"factor": True}), "plain"),
    Mutant("cspd: std doubled", Tempered(**EXACT), "plain"),
    Mutant("cspd: residual is p", FromTarget(**EXACT), "plain"),
    Mutant("cspd: no truncation", ContinuousSpeculative(**EXACT, truncate=False), "plain"),
    Mutant("cspd: prefix only", ContinuousSpeculative(**EXACT | {"nested": False}), "plain"),
    Mutant("cspd: zero at trial 100", Capped(**EXACT), "close draft"),
    Mutant("cspd: drafts' means", WithNoise(**EXACT, kind=NoDraftNoise), "plain"),
    Mutant("cspd: sample as uniform", WithNoise(**EXACT, kind=DraftNormalAsUniform), "plain"),
    Mutant("cspd: uniform as trial", UniformAsTrial(**EXACT), "plain"),
    Mutant("cspd: one noise bank", WithNoise(**EXACT, kind=OnePosition), "plain"),
    Mutant("cspd: one scale", OneScale(**EXACT), "guidance 2.5, linear"),
)
