"""Known-bad samplers with the mistakes of published ones: `visar verify` must reject every one of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from visar.engine.drafter import Drafter
from visar.engine.rng import Noise, Purpose
from visar.engine.session import Session
from visar.engine.tree import Tree
from visar.samplers.base import Sampler, State
from visar.samplers.beam_tree import BeamState, BeamTree, Drafted
from visar.samplers.diagonal import Diagonal, DiagonalState
from visar.samplers.distribution import Target
from visar.samplers.dynamic import DynamicSpeculative, DynamicState
from visar.samplers.dynamic_trees import CalibratedTree, CountedState
from visar.samplers.jacobi import JacobiState, SpeculativeJacobi
from visar.samplers.speculative import Children, Speculative, TreeSpeculative, TreeState, Verification
from visar.samplers.tree_verification import ChildRule, Independent, Sampled
from visar.samplers.verification import (
    StepNoise,
    Verified,
    accepts,
    gumbel_max,
    leading,
    residual,
    sample,
    verify_independent,
)


@dataclass(frozen=True)
class StaleDraftProbs(SpeculativeJacobi):
    """A draft that stays after the first rejection has the distribution it was sampled from a pass earlier."""

    def next_draft_probs(self, p: Tensor, q: Tensor, verified: Verified, inputs: Tensor) -> Tensor:
        unchanged = (verified.tokens[:, :-1] == inputs[:, 1:])[..., None]
        return torch.cat([torch.where(unchanged, q, p[:, :-1]), p[:, -1:]], dim=1)


@dataclass(frozen=True)
class RewarpedResidual(SpeculativeJacobi):
    """The residual goes through temperature, top-k and top-p a second time."""

    def verify(self, p: Tensor, q: Tensor, drafts: Tensor, noise: StepNoise, state: State) -> Verified:
        is_accepted = accepts(p[:, :-1], q, drafts, noise.accept[:, :-1])
        r = residual(p[:, :-1], q)
        positions = torch.zeros(r.shape[:2], dtype=torch.long)
        again = replace(state.target, forced=None).probs(r.log(), positions)
        fresh = sample(torch.cat([again, p[:, -1:]], dim=1), noise.sample)
        return Verified(
            torch.cat([torch.where(is_accepted, drafts, fresh[:, :-1]), fresh[:, -1:]], dim=1), leading(is_accepted)
        )


@dataclass(frozen=True)
class NoResidual(SpeculativeJacobi):
    """A rejected draft is replaced by a sample from p."""

    def verify(self, p: Tensor, q: Tensor, drafts: Tensor, noise: StepNoise, state: State) -> Verified:
        is_accepted = accepts(p[:, :-1], q, drafts, noise.accept[:, :-1])
        fresh = sample(p, noise.sample)
        return Verified(
            torch.cat([torch.where(is_accepted, drafts, fresh[:, :-1]), fresh[:, -1:]], dim=1), leading(is_accepted)
        )


@dataclass(frozen=True)
class ReusedGumbel(SpeculativeJacobi):
    """The residual is sampled with the very noise that sampled the rejected draft."""

    def verify(self, p: Tensor, q: Tensor, drafts: Tensor, noise: StepNoise, state: State) -> Verified:
        assert noise.exponential is not None
        verified = super().verify(p, q, drafts, noise, state)
        column = torch.arange(drafts.shape[1])
        rejected = column == verified.accepted[:, None]
        again = gumbel_max(residual(p[:, :-1], q), noise.exponential[:, :-1])
        tokens = verified.tokens.clone()
        tokens[:, :-1] = torch.where(rejected, again, tokens[:, :-1])
        return Verified(tokens, verified.accepted)


@dataclass(frozen=True)
class MeanTestedAsLeft(SpeculativeJacobi):
    """A draft that enters the window was sampled from the mean of two distributions, and is tested as from one."""

    def fresh_drafts(
        self, session: Session, state: JacobiState, positions: Tensor, known: Tensor, u: Tensor,
        last_probs: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        drafts, probs = super().fresh_drafts(session, state, positions, known, u, last_probs)
        return drafts, probs if last_probs is None else last_probs.expand_as(probs)


@dataclass(frozen=True)
class LongestPath(SpeculativeJacobi):
    """The chain is tested twice with independent uniforms, and the longer result is taken."""

    def verify(self, p: Tensor, q: Tensor, drafts: Tensor, noise: StepNoise, state: State) -> Verified:
        one = super().verify(p, q, drafts, noise, state)
        other = super().verify(p, q, drafts, noise._replace(accept=1 - noise.accept, sample=1 - noise.sample), state)
        longer = other.accepted > one.accepted
        return Verified(
            torch.where(longer[:, None], other.tokens, one.tokens), torch.where(longer, other.accepted, one.accepted)
        )


@dataclass(frozen=True)
class OutOfOrder(TreeSpeculative):
    """Children that were sampled one after the other are tested in the opposite order."""

    @cached_property
    def tables(self) -> tuple[Tree, Tensor]:
        tree, children = super().tables
        return tree, children.flip(-1)


@dataclass(frozen=True)
class Pruned(TreeSpeculative):
    """Of the sampled children of a node, those with less than the mean of the draft distribution are dropped."""

    def draft(
        self, drafter: Drafter, tree: Tree, session: Session, state: TreeState, u: Tensor
    ) -> tuple[Tensor, Tensor]:
        tokens, draft_probs = super().draft(drafter, tree, session, state, u)
        return torch.cat([tokens[:, :1], without_small(tokens[:, 1:], draft_probs, tree)], dim=1), draft_probs


def without_small(drafts: Tensor, draft_probs: Tensor, tree: Tree) -> Tensor:
    """-1 for the drafts [B, T - 1] of a tree that their own distribution, of [B, T, V], gives less than the mean."""
    parents = tree.parents[:, 1:].expand(len(drafts), -1)
    own = draft_probs[torch.arange(len(drafts))[:, None], parents, drafts.clamp_min(0)]
    return torch.where(own < 1 / draft_probs.shape[-1], -1, drafts)


@dataclass(frozen=True)
class PrunedBeam(BeamTree):
    """The same in a tree that stochastic beam search gave, as EAGLE-2 would prune it."""

    children: Children = "sampled"
    nodes: int = 0

    def draft(self, drafter: Drafter, session: Session, state: BeamState) -> Drafted:
        drafted = super().draft(drafter, session, state)
        return drafted._replace(tokens=without_small(drafted.tokens, drafted.q, drafted.tree))


@dataclass(frozen=True)
class LevelsDropped(BeamTree):
    """The last level of a sampled tree is dropped where its drafts are improbable together, although it was sampled."""

    children: Children = "sampled"
    nodes: int = 0

    def draft(self, drafter: Drafter, session: Session, state: BeamState) -> Drafted:
        drafted = super().draft(drafter, session, state)
        parents = drafted.tree.parents[:, 1:]
        own = drafted.q[torch.arange(len(parents))[:, None], parents, drafted.tokens.clamp_min(0)]
        deepest = (drafted.tree.depths[:, 1:] == self.depth) & (drafted.tokens >= 0)
        mass = torch.where(deepest, own, 0).sum(1, keepdim=True)
        return drafted._replace(tokens=torch.where(deepest & (mass < 1), -1, drafted.tokens))


@dataclass(frozen=True)
class WorthByToken(CalibratedTree):
    """A draft that its own distribution gives less than the mean is not worth a test, although it was sampled."""

    def draft(self, drafter: Drafter, session: Session, state: CountedState) -> Drafted:
        drafted = super().draft(drafter, session, state)
        return drafted._replace(tokens=without_small(drafted.tokens, drafted.q, drafted.tree))


@dataclass(frozen=True)
class ChosenBeamAsSampled(BeamTree):
    """EAGLE-2's tree, tested as if its drafts had been sampled."""

    def rule(self, session: Session) -> ChildRule:
        return Sampled()


@dataclass(frozen=True)
class PaddedWithZero(TreeSpeculative):
    """Where the distribution could give no more children, token 0 is tested instead."""

    def draft(
        self, drafter: Drafter, tree: Tree, session: Session, state: TreeState, u: Tensor
    ) -> tuple[Tensor, Tensor]:
        tokens, draft_probs = super().draft(drafter, tree, session, state, u)
        return tokens.clamp_min(0), draft_probs


@dataclass(frozen=True)
class ChosenAsSampled(TreeSpeculative):
    """The most likely tokens of the draft distribution are tested as if they had been sampled from it."""

    children: Children = "chosen"

    def rule(self, session: Session) -> ChildRule:
        return Sampled()


class Undivided(Independent):
    """Every child may take min(p, q), as if it were the only one."""

    def at_node(self, p: Tensor, q: Tensor, children: Tensor) -> Self:
        return super().at_node(p, q, torch.ones_like(children))


@dataclass(frozen=True)
class UndividedShare(TreeSpeculative):
    """Children sampled independently, each tested with min(1, p/q)."""

    children: Children = "independent"

    def rule(self, session: Session) -> ChildRule:
        return Undivided()


@dataclass(frozen=True)
class DroppedDraft(DynamicSpeculative):
    """A chain ends before a draft that its own distribution gives less than the mean, although it was sampled."""

    def draft(
        self, drafter: Drafter, session: Session, state: DynamicState, at: Tensor, u: Tensor
    ) -> tuple[Tensor, Tensor]:
        drafts, draft_probs = super().draft(drafter, session, state, at, u)
        own = draft_probs.gather(-1, drafts.clamp_min(0)[..., None]).squeeze(-1)
        gone = (own < 1 / session.vocab).cummax(1).values
        return torch.where(gone, -1, drafts), torch.where(gone[..., None], 0, draft_probs)


@dataclass(frozen=True)
class UnlikelyDraft(DynamicSpeculative):
    """A chain ends before the draft that the head takes for a rejection, although it was sampled."""

    def draft(
        self, drafter: Drafter, session: Session, state: DynamicState, at: Tensor, u: Tensor
    ) -> tuple[Tensor, Tensor]:
        drafts, draft_probs = super().draft(drafter, session, state, at, u)
        predicted = drafter.chance(drafts, draft_probs)
        assert predicted is not None
        gone = (predicted < 1 - self.stop).cummax(1).values
        return torch.where(gone, -1, drafts), torch.where(gone[..., None], 0, draft_probs)


@dataclass(frozen=True)
class StopsAtRejection(DynamicSpeculative):
    """A chain ends before the draft that the target is about to reject, as if it had never been sampled."""

    def verify(self, p: Tensor, q: Tensor, drafts: Tensor, noise: StepNoise, state: State) -> Verified:
        gone = ~accepts(p[:, :-1], q, drafts.clamp_min(0), noise.accept[:, :-1])
        return super().verify(p, torch.where(gone[..., None], 0, q), torch.where(gone, -1, drafts), noise, state)


@dataclass(frozen=True)
class RawBonus(Speculative):
    """The bonus token is sampled from the distribution before temperature, which is 0.6 in its case."""

    def verify(self, p: Tensor, q: Tensor, drafts: Tensor, noise: StepNoise, state: State) -> Verified:
        raw = p[:, -1:] ** 0.6
        p = torch.cat([p[:, :-1], raw / raw.sum(-1, keepdim=True)], dim=1)
        return super().verify(p, q, drafts, noise, state)


@dataclass(frozen=True)
class UncappedBlock(Speculative):
    """The whole chain is accepted with the product of its ratios, which block verification caps at every draft.

    Released code of hierarchical speculative decoding (arXiv:2601.05724) does so; capped, it is block verification.
    """

    verification: Verification = "block"

    def verify(self, p: Tensor, q: Tensor, drafts: Tensor, noise: StepNoise, state: State) -> Verified:
        verified = super().verify(p, q, drafts, noise, state)
        at = drafts[..., None]
        ratio = (p[:, :-1].gather(-1, at).double() / q.gather(-1, at).double()).prod(1)
        whole = noise.accept[:, -2, None] < ratio
        bonus = torch.cat([drafts, sample(p[:, -1], noise.sample[:, -1])[:, None]], dim=1)
        return Verified(
            torch.where(whole, bonus, verified.tokens), torch.where(whole[:, 0], drafts.shape[1], verified.accepted)
        )


@dataclass(frozen=True)
class DraftsOutOfBounds(Speculative):
    """Drafts are sampled from all tokens, and tested as if from those that are allowed."""

    def draft(self, drafter: Drafter, session: Session, state: State, at: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        own, state.target = state.target, replace(state.target, allowed=None)
        drafts, q = super().draft(drafter, session, state, at, u)
        state.target = own
        q = torch.where(own.allowed, q, 0.0) if own.allowed is not None else q
        return drafts, q / q.sum(-1, keepdim=True)


@dataclass(frozen=True)
class OneUniform(Diagonal):
    """All cells of a diagonal are sampled with the uniform of its first."""

    def sampled(self, p: Tensor, at: Tensor, state: DiagonalState) -> Tensor:
        return super().sampled(p, at[:, :1].expand_as(at), state)


@dataclass(frozen=True)
class BottomUp(Diagonal):
    """The cells of a diagonal are stored from the bottom to the top."""

    def sampled(self, p: Tensor, at: Tensor, state: DiagonalState) -> Tensor:
        tokens, count = super().sampled(p, at, state), (at < state.target.length).sum(1, keepdim=True)
        return tokens.gather(1, (count - 1 - torch.arange(at.shape[1])).clamp_min(0))


@dataclass(frozen=True)
class LongestOrder:
    """Drafts are tested in several random orders of the cells, and the one with the most accepted is kept.

    The rule of sigma-GPT (Pannatier et al. 2024, arXiv:2404.09562). With one of `orders`, drawn before anything is
    tested, the sampler is exact.
    """

    orders: int = 2
    name: ClassVar[str] = "longest of several orders"
    exact: ClassVar[bool] = False
    window: ClassVar[int] = 4

    def begin(self, session: Session, target: Target, noise: Noise) -> State:
        return State.empty(session, target, noise, self.window)

    def step(self, session: Session, state: State) -> None:
        cells, tokens, accepted = self.tested(session, state, 0)
        for trial in range(1, self.orders):
            others, drafts, count = self.tested(session, state, trial)
            longer = (count > accepted)[:, None]
            cells, tokens = torch.where(longer, others, cells), torch.where(longer, drafts, tokens)
            accepted = torch.maximum(count, accepted)
        session.cells = cells
        state.commit(session, tokens, accepted)

    def tested(self, session: Session, state: State, trial: int) -> tuple[Tensor, Tensor, Tensor]:
        """An order of the cells [B, N], the window's tokens [B, W] in it, and how many drafts it accepts [B]."""
        assert session.cells is not None
        every, known = torch.arange(session.length).expand(session.batch, -1), session.lengths[:, None]
        turn = state.noise.uniforms(Purpose.ORDER, every, state.passes, trial)[0]
        turn = torch.where(every < known, every - session.length, turn)
        session.cells = session.cells.gather(1, turn.argsort(1))
        drafts = (state.noise.uniforms(Purpose.DRAFT, session.cells, state.passes)[0] * session.vocab).long()
        at = session.positions(self.window)
        own = drafts.gather(1, at.clamp_max(session.length - 1))[:, :-1]
        p = state.target.probs(session.forward(torch.cat([state.inputs(session, 1), own], dim=1)), at)
        q = torch.full_like(p[:, :-1], 1 / session.vocab)
        noise = StepNoise(*state.noise.uniforms(Purpose.STEP, at, state.passes, trial))
        tokens, accepted = verify_independent(p, q, own, noise)
        return session.cells, tokens, torch.minimum(accepted, session.length - 1 - session.lengths)


@dataclass(frozen=True)
class Mutant:
    """A wrong sampler and the case of `visar.eval.exactness.joint` in which it shows."""

    name: str
    sampler: Sampler
    case: str


MUTANTS = (
    Mutant("stale draft distribution", StaleDraftProbs(coupling="maximal"), "plain"),
    Mutant("residual re-warped (T)", RewarpedResidual(coupling="maximal"), "temperature 0.6"),
    Mutant("residual re-warped (top-p)", RewarpedResidual(), "top-p 0.7"),
    Mutant("residual replaced by p", NoResidual(), "plain"),
    Mutant("Gumbel noise reused", ReusedGumbel(coupling="gumbel"), "top-p 0.7"),
    Mutant("mean tested as left", MeanTestedAsLeft(), "init above-probs, columns 2"),
    Mutant("longest path", LongestPath(), "plain"),
    Mutant("children out of order", OutOfOrder(tree="2x2", drafter="model"), "full prefix"),
    Mutant("children pruned by q", Pruned(tree="2x2", drafter="model"), "plain"),
    Mutant("beam pruned by q", PrunedBeam(beam=2, depth=2, drafter="model"), "plain"),
    Mutant("level dropped by q", LevelsDropped(beam=2, depth=2, drafter="model"), "plain"),
    Mutant("worth by the token", WorthByToken(beam=3, depth=3, drafter="model"), "plain"),
    Mutant("chosen beam as sampled", ChosenBeamAsSampled(beam=2, depth=2, nodes=4, drafter="model"), "plain"),
    Mutant("padding with token 0", PaddedWithZero(tree="3x2", drafter="model"), "top-p 0.7"),
    Mutant("chosen tested as sampled", ChosenAsSampled(tree="2x2", drafter="model"), "plain"),
    Mutant("k-SEQ undivided", UndividedShare(tree="3x2", drafter="model"), "plain"),
    Mutant("small drafts dropped", DroppedDraft(), "plain"),
    Mutant("unlikely draft dropped", UnlikelyDraft(), "an acceptance head"),
    Mutant("chain ends at a rejection", StopsAtRejection(), "an acceptance head"),
    Mutant("drafts that are not allowed", DraftsOutOfBounds(), "allowed tokens"),
    Mutant("one uniform for a diagonal", OneUniform(), "diagonals"),
    Mutant("diagonals upside down", BottomUp(), "diagonals"),
    Mutant("longest of several orders", LongestOrder(), "any order"),
    Mutant("block with an uncapped end", UncappedBlock(), "plain"),
    Mutant("bonus from raw logits", RawBonus(gamma=1), "temperature 0.6"),
)
