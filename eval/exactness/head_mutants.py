"""Known-bad samplers for `continuous_mutants`: plain decoding of a masked model, and speculation in its head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from visar.engine.denoising import Denoiser
from visar.engine.masked_session import MaskedSession
from visar.engine.rng import Noise, Purpose
from visar.samplers import ContinuousTarget, HeadSpeculation, MaskedAutoregressive
from visar.samplers.gaussian import Gaussian, reflected
from visar.samplers.masked import MaskedState, NoiseBank


def retold(session: MaskedSession, count: Callable[[Tensor, Tensor], Tensor]) -> None:
    """From now on guidance takes count(told, known) for the number of tokens there are."""
    plain = session.context

    def context(
        tokens: Tensor, rows: Tensor, known: Tensor, ask: Tensor, told: Tensor, valid: Tensor | None = None
    ) -> Tensor:
        return plain(tokens, rows, known, ask, count(told, known), valid)

    session.context = context  # type: ignore[method-assign, assignment]


@dataclass(frozen=True)
class StaleGuidance(MaskedAutoregressive):
    """Guidance goes by the tokens that there are before the pass."""

    def begin(self, session: MaskedSession, target: ContinuousTarget, noise: Noise) -> MaskedState:
        retold(session, lambda told, known: torch.full_like(told, known.shape[1]))
        return super().begin(session, target, noise)


@dataclass(frozen=True)
class OneBank(MaskedAutoregressive):
    """The noise of an image's tokens is that of its first position."""

    def sample(self, session: MaskedSession, denoiser: Denoiser, condition: Tensor, bank: NoiseBank) -> Tensor:
        rows = torch.arange(len(bank.start))
        return super().sample(
            session, denoiser, condition, NoiseBank.sample(bank.noise, rows, torch.zeros_like(rows), denoiser)
        )


@dataclass(frozen=True)
class Untested(HeadSpeculation):
    """Every draft is accepted."""

    def _tested(
        self, states: Tensor, drafts: Gaussian, kernel: Gaussian, which: Tensor, turn: Tensor, steps: Tensor,
        tested: Tensor, uniforms: Tensor,
    ) -> Tensor:  # fmt: skip
        return tested[tested]


@dataclass(frozen=True)
class NoTruncation(HeadSpeculation):
    """Drafts after a rejected one are accepted: only the last of a window can be lost."""

    def _tested(
        self, states: Tensor, drafts: Gaussian, kernel: Gaussian, which: Tensor, turn: Tensor, steps: Tensor,
        tested: Tensor, uniforms: Tensor,
    ) -> Tensor:  # fmt: skip
        is_accepted = super()._tested(states, drafts, kernel, which, turn, steps, tested, uniforms)
        end = torch.zeros(len(states), dtype=torch.long).scatter_reduce(0, which, turn, "amax")
        return is_accepted | (turn + 1 < end[which])[tested]


@dataclass(frozen=True)
class DraftStd(HeadSpeculation):
    """The ratio has the draft's standard deviation in both distributions."""

    def _tested(
        self, states: Tensor, drafts: Gaussian, kernel: Gaussian, which: Tensor, turn: Tensor, steps: Tensor,
        tested: Tensor, uniforms: Tensor,
    ) -> Tensor:  # fmt: skip
        std = kernel.std.clone()
        std[tested] = drafts.std[which[tested], turn[tested]]
        return super()._tested(states, drafts, Gaussian(kernel.mean, std), which, turn, steps, tested, uniforms)


@dataclass(frozen=True)
class Mirrored(HeadSpeculation):
    """A rejected draft is reflected although the covariances differ."""

    def _replacement(
        self, states: Tensor, drafts: Gaussian, own: Gaussian, run: Tensor, at: Tensor, bank: NoiseBank, row: Tensor,
        rejected: Tensor,
    ) -> Tensor:  # fmt: skip
        turn = run[rejected]
        gaussian = Gaussian(drafts.mean[rejected, turn], drafts.std[rejected, turn])
        return reflected(states[rejected, turn + 1], own.at(rejected), gaussian)


@dataclass(frozen=True)
class StepFromTarget(HeadSpeculation):
    """A rejected draft is replaced by a sample from the target's step."""

    def _replacement(
        self, states: Tensor, drafts: Gaussian, own: Gaussian, run: Tensor, at: Tensor, bank: NoiseBank, row: Tensor,
        rejected: Tensor,
    ) -> Tensor:  # fmt: skip
        tokens, steps = row[rejected], (at + run)[rejected]
        noise = bank.noise.of(tokens)
        normals = noise.normals(Purpose.RESIDUAL, bank.positions[tokens], steps[:, None], states.shape[-1])
        return own.at(rejected).sample(normals[:, 0])


class UniformOfNormal(NoiseBank):
    """The uniform of a step is a function of the normal that sampled its draft."""

    def uniforms(self) -> Tensor:
        return torch.special.ndtr(self.steps[..., 0].double())


@dataclass(frozen=True)
class NormalAsUniform(HeadSpeculation):
    """The draft's own normal is its uniform."""

    def sample(self, session: MaskedSession, denoiser: Denoiser, condition: Tensor, bank: NoiseBank) -> Tensor:
        wrong = UniformOfNormal(bank.noise, bank.positions, bank.start, bank.steps)
        return super().sample(session, denoiser, condition, wrong)
