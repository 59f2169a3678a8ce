"""Plain decoding of a masked model (MAR, Li et al. 2024, arXiv:2406.11838), the baseline of its family.

In each of K passes the model reads the tokens so far, and the head samples the next few positions of every row's order,
independently of one another. Their number follows a cosine: single ones first, then more and more.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor

from visar.engine.denoising import Denoiser
from visar.engine.finite import is_finite
from visar.engine.masked_session import MaskedSession
from visar.engine.orders import arrange
from visar.engine.rng import Noise, Purpose
from visar.errors import VisarError
from visar.params import LARGEST
from visar.samplers.base import Sampler
from visar.samplers.gaussian import Trials
from visar.samplers.parameters import option
from visar.samplers.registry import Registered, register_sampler

Order = Literal["random", "halton", "dilated", "gtr"]  # `visar.engine.orders`; random is MAR's


@dataclass(frozen=True)
class ContinuousTarget:
    """How continuous tokens are sampled: `temperature` multiplies the standard deviation of every head step."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 0.01 <= self.temperature <= LARGEST:
            # Below, noise is lost in the rounding of fp32, and densities with it.
            most = f"{LARGEST:g}"
            raise VisarError(f"The temperature must be 0, or 0.01 or more, up to {most}, not {self.temperature}.")


@dataclass
class MaskedState:
    """A decoding in progress: `tokens` [B, N, d], 0 where not sampled yet, and the pass that sampled each, [B, N]."""

    target: ContinuousTarget
    noise: Noise
    tokens: Tensor
    commit_pass: Tensor
    denoiser: Denoiser
    draft_denoiser: Denoiser | None = None
    passes: int = 0

    def broken(self) -> bool:
        """Whether a token or a guess of a head is not finite. The host waits for the device."""
        heads = [head.finite for head in (self.denoiser, self.draft_denoiser) if head is not None]
        return not all(map(bool, (is_finite(self.tokens), *heads)))

    def check(self) -> None:
        """Raise `VisarError` where `broken`."""
        if self.broken():
            raise VisarError("Tokens are not finite; use another guidance scale or temperature.")

    def write(self, positions: Tensor, tokens: Tensor) -> None:
        """Write the tokens [B, n, d] at `positions` [B, n]."""
        self.tokens.scatter_(1, positions[..., None].expand_as(tokens), tokens)
        self.commit_pass.scatter_(1, positions, self.passes)


class MaskedSampler(Protocol):
    """What every sampler of a masked model is; `exact` says whether tokens have the distribution of its parameters."""

    @property
    def name(self) -> str: ...

    @property
    def exact(self) -> bool: ...

    @property
    def window(self) -> int: ...

    def begin(self, session: MaskedSession, target: ContinuousTarget, noise: Noise) -> MaskedState: ...

    def step(self, session: MaskedSession, state: MaskedState) -> None: ...


AnySampler = Sampler | MaskedSampler


def plan(length: int, passes: int) -> list[tuple[int, int]]:
    """For each pass: how many tokens it samples, and the number of known tokens that guidance assumes after it.

    The cosine schedule of MaskGIT, with at least one token per pass. In the last pass the two differ: the reference
    counts one token as still hidden there.
    """
    if not 1 <= passes <= length:
        raise VisarError(f"{length} tokens are sampled in 1 to {length} passes, not {passes}.")
    out, hidden = [], length
    for i in range(passes):
        left = max(1, min(hidden - 1, math.floor(length * math.cos(math.pi / 2 * (i + 1) / passes))))
        last = i == passes - 1
        out.append((hidden if last else hidden - left, length - left))
        hidden = left
    return out


def two_stages(length: int, passes: int) -> list[tuple[int, int]]:
    """As `plan`, for GtR: half of the tokens in equal parts, and the other half in the last pass."""
    half = -(-length // 2)
    if not 2 <= passes <= half + 1:
        raise VisarError(f"With order gtr {length} tokens are sampled in 2 to {half + 1} passes, not {passes}.")
    ends = [half * i // (passes - 1) for i in range(passes)]
    return [(b - a, b) for a, b in itertools.pairwise(ends)] + [(length - half, length - 1)]


def checked_latest(latest: int) -> None:
    """A `VisarError` for a noisiest step that there is not."""
    if latest != 0 and not 1 <= latest <= 999:
        raise VisarError(f"latest must be from 1 to 999, or 0 for the model's own, not {latest}.")


@dataclass(frozen=True)
class NoiseBank:
    """The noise of some tokens' chains, sampled at once: `start` [R, d], `steps` [R, T, d], `uniforms` [R, T].

    It is keyed by position and step alone, so a step that is drafted again gets the same noise; no token that was
    sampled before depends on it.
    """

    noise: Noise  # of R rows
    positions: Tensor  # [R, 1]
    start: Tensor
    steps: Tensor

    @staticmethod
    def sample(noise: Noise, rows: Tensor, positions: Tensor, denoiser: Denoiser) -> NoiseBank:
        """For the tokens at `positions` [R] of the rows [R] of the batch."""
        own, at = noise.of(rows), positions[:, None]
        steps = torch.arange(denoiser.steps, device=positions.device).expand(len(positions), -1)
        bank = own.normals(Purpose.SHARED, at.expand_as(steps), steps, denoiser.dim)
        return NoiseBank(own, at, own.normals(Purpose.INIT, at, 0, denoiser.dim)[:, 0], bank)

    def uniforms(self) -> Tensor:
        """A uniform for each step, float64 [R, T]."""
        steps = torch.arange(self.steps.shape[1], device=self.positions.device).expand(len(self.positions), -1)
        return self.noise.uniforms(Purpose.STEP, self.positions.expand_as(steps), steps)[0]


def residual_trials(noise: Noise, positions: Tensor, turns: Tensor, dim: int, count: int) -> Trials:
    """Noise for `gaussian.residual`, `count` trials at a time, for the tokens at `positions` [R] of the rows of
    `noise`.

    `turns` [R] tell apart what is sampled for one position more than once. A uniform is the distribution's function of
    one more normal.
    """

    def trials(block: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        at, turn = (t[rows, None].expand(-1, count) for t in (positions, turns))
        number = block * count + torch.arange(count, device=positions.device)
        sampled = noise.of(rows).normals(Purpose.RESIDUAL, at, turn, dim + 1, number)
        return sampled[..., :dim], torch.special.ndtr(sampled[..., dim].double())

    return trials


@register_sampler(
    "mar-gtr",
    paper="GtR, Yan et al. 2025, arXiv:2510.17171",
    exact=False,
    order="gtr",
    steps=32,
    head_steps=50,
    last_head_steps=20,
)
@register_sampler(
    "mar-disa",
    paper="DiSA, Zhao et al. 2025, arXiv:2505.20297",
    exact=False,
    head_steps=50,
    last_head_steps=5,
    latest=950,
)
@register_sampler("mar-32-50", paper="MAR, fewer passes and steps", steps=32, head_steps=50)
@register_sampler("mar-256", paper="MAR, a token in each pass", steps=256)
@register_sampler("mar", paper="MAR, Li et al. 2024, arXiv:2406.11838, the baseline")
@dataclass(frozen=True)
class MaskedAutoregressive(Registered):
    """K passes (`steps`) of the model and T steps (`head_steps`) of the head for each.

    `latest` is the noisiest of the 1000 training steps that is used, 0 being what the model wants; the published
    sampler begins at 999, where the error of the network is multiplied by 20,000. With `last_head_steps` T falls
    linearly to it over the passes; that and `latest` 950 is DiSA (Zhao et al. 2025, arXiv:2505.20297), another
    distribution. `last_noise` adds noise in the last head step. An `order` of positions other than random (see
    `visar.engine.orders`) is another distribution too; "gtr" samples half of the tokens in the last pass.
    """

    steps: int = option(64, "passes of the model, at most one per token", 1, 256)
    head_steps: int = option(100, "steps of the diffusion head in a pass", 2, 1000)
    last_head_steps: int = option(0, "steps that the head falls to over the passes; 0 for as many in all", 0, 1000)
    latest: int = option(0, "the noisiest training step that is used; 0 for the model's own", 0, 999)
    last_noise: bool = option(False, "add noise in the last head step")
    order: Order = option("random", "the order of positions; only random is the model's own")
    tokens: ClassVar[str] = "continuous"
    window: ClassVar[int] = 2**16  # no bound on the tokens of a pass

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise VisarError(f"steps must be 1 or more, not {self.steps}.")
        for name, value in (("head_steps", self.head_steps), ("last_head_steps", self.last_head_steps or 2)):
            if not 2 <= value <= 1000:
                raise VisarError(f"{name} must be from 2 to 1000, not {value}.")
        if self.last_head_steps > self.head_steps:
            raise VisarError(f"last_head_steps must be at most head_steps, {self.head_steps}.")
        checked_latest(self.latest)
        if self.order not in get_args(Order):
            raise VisarError(f"Unknown order {self.order!r}; known: {', '.join(get_args(Order))}.")

    @property
    def exact(self) -> bool:
        return not self.last_head_steps and self.order == "random"

    def plan(self, length: int) -> list[tuple[int, int]]:
        """`plan` of its passes, or `two_stages`."""
        return (two_stages if self.order == "gtr" else plan)(length, self.steps)

    def begin(self, session: MaskedSession, target: ContinuousTarget, noise: Noise) -> MaskedState:
        self.plan(session.length - session.given)  # before anything is computed
        session.order = arrange(session, self.order)
        return MaskedState(
            target,
            noise,
            session.start.clone(),
            torch.full((session.batch, session.length), -1, dtype=torch.long, device=session.device),
            self.denoiser_of(session, target, 0),
        )

    def step(self, session: MaskedSession, state: MaskedState) -> None:
        todo = self.plan(session.length - session.given)
        if state.passes >= len(todo):
            return
        count, known = todo[state.passes]
        done = session.given + sum(n for n, _ in todo[: state.passes])
        ask = session.order[:, done : done + count]
        rows = torch.arange(session.batch, device=session.device)
        condition = session.context(
            state.tokens, rows, session.order[:, :done], ask, torch.full_like(ask, session.given + known)
        )
        if self.last_head_steps:
            state.denoiser = self.denoiser_of(session, state.target, state.passes)
        bank = NoiseBank.sample(state.noise, rows.repeat_interleave(count), ask.flatten(), state.denoiser)
        sampled = self.sample(session, state.denoiser, condition.flatten(0, 1), bank)
        state.write(ask, sampled.unflatten(0, ask.shape))
        session.commit(count)
        state.passes += 1

    def denoiser_of(self, session: MaskedSession, target: ContinuousTarget, turn: int) -> Denoiser:
        if not self.last_head_steps:
            return session.denoiser(self.head_steps, target.temperature, self.latest, self.last_noise)
        left = (self.steps - 1 - turn) / (self.steps - 1) if self.steps > 1 else 1.0
        steps = self.last_head_steps + int(left * (self.head_steps - self.last_head_steps))
        return session.denoiser(steps, target.temperature, self.latest, self.last_noise)

    def sample(self, session: MaskedSession, denoiser: Denoiser, condition: Tensor, bank: NoiseBank) -> Tensor:
        """Tokens [R, d] under conditions [R, K]."""
        return denoiser.denoise(condition, bank.start, bank.steps)
