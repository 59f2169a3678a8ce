"""The Jacobi family: greedy Jacobi decoding, speculative Jacobi decoding, and its coupled variants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from visar.engine.rng import Noise, Purpose
from visar.engine.session import Session
from visar.errors import VisarError
from visar.kernels.noise import ExponentialNoise
from visar.samplers.base import State
from visar.samplers.distribution import Target
from visar.samplers.parameters import option
from visar.samplers.registry import Registered, register_sampler
from visar.samplers.verification import (
    StepNoise,
    Verified,
    verify_greedy,
    verify_gumbel,
    verify_independent,
    verify_maximal,
)
from visar.samplers.windows import Init, initial_drafts, shift

Coupling = Literal["independent", "maximal", "gumbel"]
RULES = {"independent": verify_independent, "maximal": verify_maximal, "gumbel": verify_gumbel}


@dataclass
class JacobiState(State):
    """`draft_probs` [B, W-1, V]: what the drafts of the window were sampled from.

    `seen` [B, R, V]: the distributions of the latest R positions, each at its number modulo R; R is 0 where the
    `init` reads none, and all positions in another order than the raster's.
    """

    draft_probs: Tensor
    seen: Tensor


def _stride(session: Session) -> int:
    return 0 if session.layout is None else session.layout.stride


def _nearest(session: Session, positions: Tensor, known: Tensor) -> Tensor | None:
    """Of the first `known` [B] positions, the one whose cell is nearest to that of each of `positions` [B, W - 1], the
    earliest of equal ones; None in raster order, where that is for `init` to say."""
    if session.cells is None or session.layout is None:
        return None
    row, column = session.cells // session.layout.columns, session.cells % session.layout.columns
    own = positions.clamp_max(session.length - 1)
    down, across = (x.gather(1, own)[..., None] - x[:, None] for x in (row, column))
    unknown = torch.arange(session.length, device=known.device) >= known[:, None, None]
    return (down**2 + across**2).masked_fill(unknown, 2 * session.length**2).min(-1).indices


def check_window(window: int) -> None:
    if window < 2:
        raise VisarError(f"The window must be 2 or more tokens, not {window}; for one token per pass use sampler 'ar'.")


@register_sampler("scd-gumbel", paper="SCD, Gumbel coupling", coupling="gumbel")
@register_sampler("scd", paper="MC-SJD / SCD, maximal coupling", coupling="maximal")
@register_sampler("sjd", paper="Teng et al. 2024, arXiv:2410.01699")
@dataclass(frozen=True)
class SpeculativeJacobi(Registered):
    """Speculative Jacobi decoding (SJD, Teng et al. 2024, arXiv:2410.01699) and its coupled forms (MC-SJD / SCD).

    `window` is W, the inputs of a pass, of which W - 1 are drafts. `coupling` says how a draft after a rejection
    follows its predecessor: "independent" samples it again (SJD), "maximal" and "gumbel" make the two coincide as often
    as they can. `init` is the distribution of a position that enters the window (see `visar.samplers.windows`); those
    that look at the cell above need a session that has a `layout`, in raster order. All of them are exact.
    """

    window: int = option(16, "inputs of a pass, of which all but one are drafts", 2, 64)
    init: Init = option("uniform", "what is drafted for a position that enters the window")
    coupling: Coupling = "independent"
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.window)
        if self.coupling not in RULES:
            raise VisarError(f"Unknown coupling {self.coupling!r}; known: {', '.join(RULES)}.")
        if self.init not in get_args(Init):
            raise VisarError(f"Unknown init {self.init!r}; known: {', '.join(get_args(Init))}.")

    def begin(self, session: Session, target: Target, noise: Noise) -> JacobiState:
        if self.init in ("above", "above-probs", "mean-probs"):
            if session.layout is None:
                raise VisarError(
                    f'init="{self.init}" needs a session with a layout, the rows and columns of the image.'
                )
            if session.cells is not None:
                raise VisarError(
                    f'init="{self.init}" needs raster order, in which the cell above is known; "left" and "left-probs" '
                    "look at the nearest known cell in any order."
                )
        reach = self.window + _stride(session) if self.init in ("above-probs", "mean-probs") else 0
        if self.init == "left-probs" and session.cells is not None:
            reach = session.length + self.window  # past the end, too, so that nothing is written over
        state = JacobiState.empty(
            session, target, noise, self.window,
            draft_probs=torch.empty(session.batch, self.window - 1, session.vocab, device=session.device),
            seen=torch.empty(session.batch, reach, session.vocab, device=session.device),
        )  # fmt: skip
        at = session.positions(self.window - 1)
        u = state.noise.uniforms(Purpose.INIT, at, 0)[0]
        drafts, probs = self.fresh_drafts(session, state, at, session.lengths, u, None)
        state.draft_probs.copy_(probs)
        state.tokens.scatter_(1, at, drafts)
        return state

    def step(self, session: Session, state: JacobiState) -> None:
        window = self.window
        at = session.positions(window)
        inputs = state.inputs(session, window)
        p = state.target.probs(session.forward(inputs), at)
        # One call for all noise of the pass: positions in the window use both numbers, those that enter it the first.
        accept, sample = state.noise.uniforms(Purpose.STEP, session.positions(2 * window - 1), state.passes)
        noise = StepNoise(accept[:, :window], sample[:, :window], self._exponential_noise(session, state, at))
        verified = self.verify(p, state.draft_probs, inputs[:, 1:], noise, state)
        end = at[:, -1] + 1  # the first position that this pass says nothing about
        count = state.commit(session, verified.tokens, verified.accepted)
        new = session.positions(window - 1)
        if state.seen.shape[1]:
            state.seen.scatter_(1, (at % state.seen.shape[1])[..., None].expand_as(p), p)
        drafts, draft_probs = self.fresh_drafts(
            session, state, new, end, accept.gather(1, new - at[:, :1]), last_probs=p[:, -1:]
        )
        fresh = new >= end[:, None]
        shifted = shift(self.next_draft_probs(p, state.draft_probs, verified, inputs), count)
        torch.where(fresh[..., None], draft_probs, shifted, out=state.draft_probs)
        state.tokens.scatter_(1, new, torch.where(fresh, drafts, state.tokens.gather(1, new)))

    def verify(self, p: Tensor, q: Tensor, drafts: Tensor, noise: StepNoise, state: State) -> Verified:
        """The rule of this coupling; a method that the known-bad samplers of `visar verify` override."""
        return RULES[self.coupling](p, q, drafts, noise)

    def fresh_drafts(
        self, session: Session, state: JacobiState, positions: Tensor, known: Tensor, u: Tensor,
        last_probs: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`initial_drafts` of this init; a method for the same reason."""
        nearest = None if self.init == "uniform" else _nearest(session, positions, known)
        return initial_drafts(
            self.init, _stride(session), state, positions, session.vocab, known=known, u=u, last_probs=last_probs,
            seen=state.seen, nearest=nearest,
            shared=self._exponential_noise(session, state, positions),
        )  # fmt: skip

    def next_draft_probs(self, p: Tensor, q: Tensor, verified: Verified, inputs: Tensor) -> Tensor:
        """What the window's tokens were sampled from, [B, W, V], after a pass: p for all, accepted or not."""
        return p

    def _exponential_noise(self, session: Session, state: State, at: Tensor) -> ExponentialNoise | None:
        return state.noise.lazy_exponential(Purpose.SHARED, at, 0, session.vocab) if self.coupling == "gumbel" else None


@register_sampler(
    "jacobi", paper="Song et al. 2021, arXiv:2002.03629", exact=False, note="exact for greedy decoding; does not sample"
)
@dataclass(frozen=True)
class Jacobi(Registered):
    """Greedy Jacobi decoding (Song et al. 2021, arXiv:2002.03629): the fixed point of argmax on a window.

    It gives the image that greedy AR decoding gives, whatever the temperature; it does not sample.
    """

    window: int = option(16, "inputs of a pass, of which all but one are drafts", 2, 64)
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.window)

    def begin(self, session: Session, target: Target, noise: Noise) -> State:
        return State.empty(session, target, noise, self.window)

    def step(self, session: Session, state: State) -> None:
        inputs = state.inputs(session, self.window)
        p = state.target.probs(session.forward(inputs), session.positions(self.window))
        verified = verify_greedy(p, inputs[:, 1:])
        end = session.positions(self.window)[:, -1:] + 1
        state.commit(session, *verified)
        # A position that enters the window repeats the last known token.
        new = session.positions(self.window - 1)
        state.tokens.scatter_(1, new, torch.where(new >= end, verified.tokens[:, -1:], state.tokens.gather(1, new)))
