"""All cells of a diagonal in one pass, for models with two-way heads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from visar.engine.diagonals import Diagonals, width_of
from visar.engine.layout import Layout
from visar.engine.rng import Noise, Purpose
from visar.engine.session import Session
from visar.errors import VisarError
from visar.samplers.base import State
from visar.samplers.distribution import Target
from visar.samplers.registry import Registered, register_sampler
from visar.samplers.verification import sample


@dataclass
class DiagonalState(State):
    """`cells` [D + 1, W], `of_length` [N + 1] and `count` [D + 1] are those of `Diagonals`."""

    cells: Tensor
    of_length: Tensor
    count: Tensor


@register_sampler(
    "diagonal", paper="He et al. 2025, arXiv:2503.10696",
    note="exact for a two-way model, which is another model than its trunk",
)  # fmt: skip
@dataclass(frozen=True)
class Diagonal(Registered):
    """Neighbouring decoding (NAR, He et al. 2025, arXiv:2503.10696; FlashAR, Zhou et al. 2026, arXiv:2605.09430).

    A pass samples a diagonal, each of its cells independently of the others given the diagonals before: 2n - 1 passes
    for n x n tokens. That is how a model with two-way heads defines its distribution, so the sampler is exact for it;
    compared with the model that its trunk was, both the distribution and the weights are others.
    """

    layout: Layout | None = field(default=None, compare=False)  # filled in by the model
    exact: ClassVar[bool] = True
    scan: ClassVar[str] = "diagonal"

    @property
    def window(self) -> int:
        """The most tokens that a pass samples."""
        return 1 if self.layout is None else width_of(self.layout)

    def begin(self, session: Session, target: Target, noise: Noise) -> DiagonalState:
        layout = self.layout
        if layout is None or layout.length != session.length or layout.line_end or layout.lead:
            raise VisarError(f"diagonal needs layout, the rows and columns of an image of {session.length} cells.")
        table = Diagonals.of(layout, session.device)
        return DiagonalState.empty(
            session, target, noise, self.window, cells=table.cells, of_length=table.of_length, count=table.count
        )

    def step(self, session: Session, state: DiagonalState) -> None:
        d = state.of_length[session.lengths]
        at, before = state.cells[d], state.cells[(d - 1).clamp_min(0)]
        p = state.target.probs(session.forward_diagonal(state.tokens.gather(1, before)), at)
        tokens = self.sampled(p, at, state)
        state.tokens.scatter_(1, at, tokens)
        state.commit_pass.scatter_(1, at, state.passes.expand_as(at))
        state.passes += 1
        session.commit(state.count[d])

    def sampled(self, p: Tensor, at: Tensor, state: DiagonalState) -> Tensor:
        """Tokens [B, W] of distributions p [B, W, V] at positions [B, W]; known-bad samplers override it."""
        return sample(p, state.noise.uniforms(Purpose.STEP, at, at)[1])
