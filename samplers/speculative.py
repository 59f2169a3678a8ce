"""Speculative sampling with a draft model: chains and trees, drafted by the session's drafter, tested in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from visar.engine.drafter import Drafter
from visar.engine.rng import Noise, Purpose
from visar.engine.session import Session
from visar.engine.tree import Tree
from visar.errors import VisarError
from visar.samplers.base import State
from visar.samplers.distribution import Target
from visar.samplers.parameters import option
from visar.samplers.registry import Registered, register_sampler
from visar.samplers.tree_verification import (
    ChildRule,
    Chosen,
    Independent,
    Sampled,
    VerifiedTree,
    most_likely,
    sample_children,
    verify_tree,
)
from visar.samplers.trees import Shape, named_tree
from visar.samplers.verification import StepNoise, Verified, sample, verify_block, verify_independent

Verification = Literal["token", "block"]
Children = Literal["sampled", "chosen", "independent"]
RULES: dict[str, type[ChildRule]] = {"sampled": Sampled, "chosen": Chosen, "independent": Independent}


def drafter_of(session: Session, kind: str) -> Drafter:
    if session.drafter is None:
        raise VisarError(f"This sampler needs a drafter of the kind {kind!r}, and the model was given none.")
    return session.drafter


@register_sampler("swift", paper="SWIFT, Xia et al. 2024, arXiv:2410.06916", drafter="skip", gamma=2)
@register_sampler("kangaroo", paper="Kangaroo, Liu et al. 2024, arXiv:2404.18911", drafter="exit", gamma=3)
@register_sampler("eagle-chain", paper="EAGLE, a chain", drafter="eagle", gamma=5)
@register_sampler("speculative-block", paper="Sun et al. 2024, arXiv:2403.10444", drafter="model", verification="block")
@register_sampler("speculative", paper="Leviathan et al. 2023, arXiv:2211.17192", drafter="model")
@dataclass(frozen=True)
class Speculative(Registered):
    """Speculative sampling (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318).

    A draft model proposes a chain of `gamma` tokens. `verification` "block" (Sun et al. 2024, arXiv:2403.10444) tests
    the chain as a whole, and accepts at least as much of it. Both are exact.
    """

    gamma: int = option(4, "drafts in a chain", 1, 16)
    verification: Verification = "token"
    drafter: str = "model"
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma < 1:
            raise VisarError(f"gamma must be 1 or more drafts, not {self.gamma}.")
        if self.verification not in get_args(Verification):
            raise VisarError(f"Unknown verification {self.verification!r}; known: {', '.join(get_args(Verification))}.")

    @property
    def window(self) -> int:
        return self.gamma + 1

    @property
    def depth(self) -> int:
        """How deep it drafts."""
        return self.gamma

    def begin(self, session: Session, target: Target, noise: Noise) -> State:
        drafter_of(session, self.drafter)
        return State.empty(session, target, noise, self.window)

    def step(self, session: Session, state: State) -> None:
        at = session.positions(self.window)
        u = state.noise.uniforms(Purpose.DRAFT, at, state.passes)[0]
        drafts, q = self.draft(drafter_of(session, self.drafter), session, state, at, u)
        at = at[:, : 1 + drafts.shape[1]]
        inputs = torch.cat([state.inputs(session, 1), drafts.clamp_min(0)], dim=1)
        p = state.target.probs(session.forward(inputs), at)
        noise = StepNoise(*state.noise.uniforms(Purpose.STEP, at, state.passes))
        verified = self.verify(p, q, drafts, noise, state)
        self.learn(state, q, drafts, verified)
        state.commit(session, *verified)

    def learn(self, state: Any, q: Tensor, drafts: Tensor, verified: Verified) -> None:
        """What a pass teaches about the drafter: nothing, where the chain has a fixed length."""

    def draft(self, drafter: Drafter, session: Session, state: Any, at: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """A chain of up to `gamma` drafts [B, n] and the distributions [B, n, V] that they were sampled from."""
        drafts, draft_probs = [], []
        logits = drafter.root(state.tokens, session.lengths)
        for i in range(self.gamma):
            draft_probs.append(state.target.probs(logits, at[:, i : i + 1], drafted=True))
            drafts.append(self.choose(draft_probs[-1], u[:, i : i + 1]))
            if i + 1 < self.gamma:
                logits = drafter.extend(drafts[-1], None, i + 1)
        return torch.cat(drafts, dim=1), torch.cat(draft_probs, dim=1)

    def choose(self, q: Tensor, u: Tensor) -> Tensor:
        """A draft [B, 1] of the distribution [B, 1, V]."""
        return sample(q, u)

    def verify(self, p: Tensor, q: Tensor, drafts: Tensor, noise: StepNoise, state: Any) -> Verified:
        """The rule; a method that the known-bad samplers of `visar verify` override."""
        return (verify_block if self.verification == "block" else verify_independent)(p, q, drafts, noise)


@dataclass
class TreeState(State):
    """The static tree, the children [1, T, C] of its nodes, -1 after the last, and the same as a tensor for each."""

    tree: Tree
    children: Tensor
    below: list[Tensor]
    rule: ChildRule


@register_sampler("hydra", paper="Hydra, Ankner et al. 2024, arXiv:2402.05109", drafter="hydra", tree="4x2x1")
@register_sampler("medusa", paper="Medusa, Cai et al. 2024, arXiv:2401.10774", drafter="medusa", tree="4x2x1")
@register_sampler(
    "spectr",
    paper="SpecTr k-SEQ, Sun et al. 2023, arXiv:2310.15141",
    drafter="model",
    tree="4x2x1",
    children="independent",
)
@register_sampler("speculative-tree", paper="RSD-C, Jeon et al. 2024, arXiv:2402.14160", drafter="model", tree="4x2x1")
@register_sampler("eagle-top", paper="EAGLE, its most likely tokens as drafts", drafter="eagle", children="chosen")
@register_sampler("eagle", paper="EAGLE, Li et al. 2024, arXiv:2401.15077", drafter="eagle")
@dataclass(frozen=True)
class TreeSpeculative(Registered):
    """A static tree of drafts, tested in one pass.

    `tree` is a name of `visar.samplers.trees`, children per depth as in "4x2x1", or paths as in "0 1 00". Children
    "sampled" come from the draft distribution one after the other without replacement, as in EAGLE (Li et al. 2024,
    arXiv:2401.15077) and RSD-C (Jeon et al. 2024, arXiv:2402.14160); "independent" are sampled with replacement, as in
    SpecTr (Sun et al. 2023, arXiv:2310.15141); "chosen" are its most likely tokens. All are exact, each with a rule of
    its own.
    """

    tree: str = option("mc25", "its shape: mc25, ext57, or children per depth as in 4x2x1")
    children: Children = "sampled"
    drafter: str = "eagle"
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.children not in get_args(Children):
            raise VisarError(f"Unknown children {self.children!r}; known: {', '.join(get_args(Children))}.")
        named_tree(self.tree)

    @cached_property
    def shape(self) -> Shape:
        return named_tree(self.tree)

    @cached_property
    def tables(self) -> tuple[Tree, Tensor]:
        """The tree, and the children [1, T, C] of its nodes, -1 after the last."""
        most = max(map(len, self.shape.children))
        table = [[*c, *[-1] * (most - len(c))] for c in self.shape.children]
        return Tree.of(self.shape.parents), torch.tensor(table)[None]

    @property
    def window(self) -> int:
        return len(self.shape.parents)

    @property
    def depth(self) -> int:
        """How deep it drafts."""
        return self.shape.depth

    def rule(self, session: Session) -> ChildRule:
        """How a child is tested; a method that the known-bad samplers of `visar verify` override."""
        return RULES[self.children]()

    def begin(self, session: Session, target: Target, noise: Noise) -> TreeState:
        drafter_of(session, self.drafter)
        (tree, children), device = self.tables, session.device
        below = [torch.tensor(c, dtype=torch.long, device=device) for c in self.shape.children]
        return TreeState.empty(
            session, target, noise, self.window, tree=tree.to(device), children=children.to(device), below=below,
            rule=self.rule(session),
        )  # fmt: skip

    def step(self, session: Session, state: TreeState) -> None:
        drafter, tree, children = drafter_of(session, self.drafter), state.tree, state.children
        nodes = session.positions(self.window)  # of the noise: one for each node, whatever its depth
        u = state.noise.uniforms(Purpose.DRAFT, nodes, state.passes)[0]
        tokens, q = self.draft(drafter, tree, session, state, u)
        p = state.target.probs(session.forward(tokens.clamp_min(0), tree), session.follows(self.window, tree))
        noise = StepNoise(*state.noise.uniforms(Purpose.STEP, nodes, state.passes))
        verified = self.verify(p, q, tokens, children, noise, state.rule)
        session.keep(verified.path)
        drafter.keep(verified.path)
        state.commit(session, verified.tokens, verified.accepted)

    def verify(
        self, p: Tensor, q: Tensor, tokens: Tensor, children: Tensor, noise: StepNoise, rule: ChildRule
    ) -> VerifiedTree:
        """The walk; a method so that `visar.eval.benchmark.calibrate` can watch it."""
        return verify_tree(p, q, tokens, children, self.depth, noise, rule)

    def draft(
        self, drafter: Drafter, tree: Tree, session: Session, state: TreeState, u: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B, T] of the nodes, the root first, -1 where there is none, and draft probabilities [B, T, V]."""
        batch, count = u.shape
        tokens = torch.full((batch, count), -1, device=u.device)
        tokens[:, :1] = state.inputs(session, 1)
        draft_probs = torch.zeros(batch, count, session.vocab, device=u.device)
        for level in self.shape.expanded():
            span = slice(level.start, level.stop)
            if level.start == 0:
                logits = drafter.root(state.tokens, session.lengths)
            else:
                logits = drafter.extend(tokens[:, span].clamp_min(0), tree, level.start)
            draft_probs[:, span] = state.target.probs(logits, session.follows(len(level), tree, level.start), True)
            for node in level:
                below = state.below[node]
                if self.children == "sampled":
                    tokens[:, below] = sample_children(draft_probs[:, node], u[:, below])
                elif self.children == "independent":
                    tokens[:, below] = sample(draft_probs[:, node, None].expand(-1, len(below), -1), u[:, below])
                else:
                    q = draft_probs[:, node]
                    best = most_likely(q, min(len(below), session.vocab))
                    tokens[:, below[: best.shape[1]]] = torch.where(q.gather(1, best) > 0, best, -1)
        return tokens, draft_probs
