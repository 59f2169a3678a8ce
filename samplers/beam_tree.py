"""Trees that are built in every pass, level by level, by a beam over the drafts of the level before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from visar.engine.drafter import Drafter
from visar.engine.rng import Noise, Purpose
from visar.engine.session import Session
from visar.engine.tree import MOST_NODES, Tree
from visar.errors import VisarError
from visar.samplers.base import State
from visar.samplers.distribution import Target
from visar.samplers.parameters import option
from visar.samplers.registry import Registered, register_sampler
from visar.samplers.speculative import Children, drafter_of
from visar.samplers.tree_verification import ChildRule, Chosen, Sampled, VerifiedTree, most_likely, verify_tree
from visar.samplers.verification import StepNoise

LATER = 1e-9  # taken off per level, so that a child never ranks before its parent


def best_of(value: Tensor, count: int) -> Tensor:
    """The numbers, ascending, of the `count` largest of each row of values [B, P], of equal ones the first.

    `topk` takes any of the equal ones, and another device takes others.
    """
    return value.sort(descending=True, stable=True).indices[:, :count].sort().values


class Drafted(NamedTuple):
    """A tree for each row: `tokens` [B, T - 1] of its drafts, -1 where there is none, and draft distributions `q` [B,
    T, V].

    `fed` [B, T]: the number that the drafter knows a node by, -1 for those it was not given, whose rows of `q` mean
    nothing. Where the rule asks for no distributions there are none, and `q` is [B, T, 1] of zeros.
    """

    tree: Tree
    tokens: Tensor
    q: Tensor
    fed: Tensor


@dataclass
class BeamState(State):
    """`rule`: how a child is tested."""

    rule: ChildRule


@register_sampler(
    "rsd-s", paper="RSD-S, Jeon et al. 2024, arXiv:2402.14160", drafter="eagle", children="sampled", nodes=0
)
@register_sampler("eagle2", paper="EAGLE-2, Li et al. 2024, arXiv:2406.16858", drafter="eagle")
@dataclass(frozen=True)
class BeamTree(Registered):
    """A beam of `beam` nodes is extended `depth` times; `nodes` drafts are tested.

    Children "chosen": the most likely continuations; the `nodes` most likely of all are tested (EAGLE-2,
    Li et al. 2024, arXiv:2406.16858). Children "sampled": stochastic beam search (Kool et al. 2019, arXiv:1903.06059),
    so the siblings of a node are sampled from its distribution without replacement and none may be dropped (RSD-S, Jeon
    et al. 2024, arXiv:2402.14160); `nodes` is 0. Both are exact, each with a rule of its own.
    """

    beam: int = option(10, "nodes that are extended in each level", 1, 15)
    depth: int = option(5, "levels of the tree", 1, 10)
    nodes: int = option(58, "drafts that are tested in a pass; 0 for all of sampled children", 0, 62)
    children: Children = "chosen"
    drafter: str = "eagle"
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.children not in ("chosen", "sampled"):
            raise VisarError(f"The children of a beam are chosen or sampled, not {self.children!r}.")
        if self.beam < 1 or self.depth < 1:
            raise VisarError(f"beam and depth must be 1 or more, not {self.beam} and {self.depth}.")
        if self.children == "sampled" and self.nodes:
            raise VisarError("Of sampled children none may be dropped: nodes must be 0.")
        least = max(self.depth, self.beam * (self.depth - 1))
        if self.children == "chosen" and self.nodes < least:
            raise VisarError(f"nodes must be {least} or more for beam {self.beam} and depth {self.depth}.")
        # A drafter with a cache of its own is fed one node more than the beam, before the root.
        if (most := max(self.window, self.beam * (self.depth - 1) + 2)) > MOST_NODES:
            raise VisarError(f"A draft tree has at most {MOST_NODES} nodes with its root, not {most}.")

    @property
    def window(self) -> int:
        return 1 + (self.nodes or self.beam * self.depth)

    def rule(self, session: Session) -> ChildRule:
        """How a child is tested; a method that the known-bad samplers of `visar verify` override."""
        return Sampled() if self.children == "sampled" else Chosen()

    def begin(self, session: Session, target: Target, noise: Noise) -> BeamState:
        drafter_of(session, self.drafter)
        return BeamState.empty(session, target, noise, self.window, rule=self.rule(session))

    def step(self, session: Session, state: BeamState) -> None:
        drafter = drafter_of(session, self.drafter)
        drafted = self.draft(drafter, session, state)
        tree, tokens = drafted.tree, torch.cat([state.inputs(session, 1), drafted.tokens], dim=1)
        count = tokens.shape[1]
        p = state.target.probs(session.forward(tokens.clamp_min(0), tree), session.follows(count, tree))
        noise = StepNoise(
            *state.noise.uniforms(Purpose.STEP, session.positions(max(count, self.depth + 1)), state.passes)
        )
        children = siblings(tree, self.beam)
        verified = verify_tree(p, drafted.q, tokens, children, self.depth, noise, state.rule)
        self.learn(state, drafted, children, verified)
        session.keep(verified.path)
        known = drafted.fed.gather(1, verified.path.clamp_min(0))
        drafter.keep(torch.where(verified.path < 0, -1, known))
        state.commit(session, verified.tokens, verified.accepted)

    def learn(self, state: Any, drafted: Drafted, children: Tensor, verified: VerifiedTree) -> None:
        """What a pass teaches about the drafter: nothing here."""

    def goes_on(self, score: Tensor) -> bool:
        """Whether beams with these scores [B, M] of their nodes are extended."""
        return True

    def draft(self, drafter: Drafter, session: Session, state: Any) -> Drafted:
        """Grow the beam, and choose what is tested."""
        batch, device = session.batch, session.device
        each = min(self.beam, session.vocab)  # children that a node may have
        known = Tree.of(torch.full((batch, 1), -1, device=device))  # what the drafter was given
        draft_probs: list[Tensor] = []  # by level: of the nodes fed,
        tokens: list[Tensor] = []  # and their children,
        values: list[Tensor] = []
        above: list[Tensor] = []  # and whose they are
        beams: list[Tensor] = []  # by level, which of the children are extended
        score = torch.zeros(batch, 1, dtype=torch.float64, device=device)
        log_probs = score
        logits, first = drafter.root(state.tokens, session.lengths), 0
        for level in range(self.depth):
            count = known.parents.shape[1] - first
            q = state.target.probs(logits, session.follows(count, known, first), drafted=True)
            draft_probs.append(q)
            joint = log_probs[..., None] + q.double().log()
            ranked = self._ranked(joint, score, session, state, first)
            # Within a node the ranks of chosen children are those of q; noise makes no two others equal.
            best = most_likely(q, each) if self.children == "chosen" else ranked.topk(each).indices
            value = self._values(ranked.gather(-1, best), q, score, state).flatten(1)
            tokens.append(torch.where(value > -torch.inf, best.flatten(1), -1))
            values.append(value - LATER * level)
            above.append(torch.arange(first, first + count, device=device).repeat_interleave(each).expand(batch, -1))
            extended = best_of(value, self.beam)
            beams.append(extended)
            if level + 1 < self.depth:
                score, fed = value.gather(1, extended), tokens[-1].gather(1, extended)
                if not self.goes_on(score):
                    break
                log_probs = joint.gather(-1, best).flatten(1).gather(1, extended)
                first = known.parents.shape[1]
                known = Tree.of(torch.cat([known.parents, above[-1].gather(1, extended)], dim=1), level + 1)
                logits = drafter.extend(fed.clamp_min(0), known, first)
        found = self._chosen(tokens, values, above, beams)
        if not state.rule.reads_q:
            return found  # its test does not ask for the distributions
        index = found.fed.clamp_min(0)[..., None].expand(-1, -1, session.vocab)
        return found._replace(q=torch.cat(draft_probs, dim=1).gather(1, index))

    def _ranked(self, joint: Tensor, score: Tensor, session: Session, state: State, first: int) -> Tensor:
        """The rank of all children [B, M, V] of M nodes with the log-probabilities `joint` and their own `score`."""
        if self.children == "chosen":
            return joint
        at = session.positions(first + joint.shape[1])[:, first:]  # of the noise: one for each node, whatever its depth
        e = state.noise.exponential(Purpose.DRAFT, at, state.passes, session.vocab).double()
        gumbel = joint - e.log()
        # Gumbels of the children, given that the largest is their parent's own (Kool et al. 2019, appendix B.3).
        parent = score[..., None]
        v = parent - gumbel + torch.log1p(-torch.exp(gumbel - gumbel.amax(-1, keepdim=True)))
        out = parent - v.clamp_min(0) - torch.log1p(torch.exp(-v.abs()))
        return torch.where(torch.isneginf(gumbel) | torch.isneginf(parent), -torch.inf, out)

    def _values(self, ranks: Tensor, q: Tensor, score: Tensor, state: Any) -> Tensor:
        """What children [B, M, C] are worth, by their ranks, where M nodes have the scores [B, M]; -inf for none."""
        return ranks

    def _tested(self, value: Tensor) -> Tensor:
        """The numbers of the children that are tested, of those with the values [B, P] in the pool."""
        return best_of(value, self.nodes)

    def _chosen(self, tokens: list[Tensor], values: list[Tensor], above: list[Tensor], beams: list[Tensor]) -> Drafted:
        """The tree of what is tested: the `nodes` most likely drafts, or all of the beams."""
        batch, device = len(tokens[0]), tokens[0].device
        starts = [0]
        for part in tokens:
            starts.append(starts[-1] + part.shape[1])
        pool, value, parent = (torch.cat(parts, dim=1) for parts in (tokens, values, above))
        in_beams = [at + start for at, start in zip(beams, starts, strict=False)]  # by level, as numbers in the pool
        drafts = torch.cat(in_beams, dim=1)
        if self.children == "chosen":
            drafts = self._tested(value)
        # A node has a number in the pool, one in the tree that is tested, and one that the drafter knows it by.
        root = torch.zeros(batch, 1, dtype=torch.long, device=device)
        tested = torch.zeros_like(pool).scatter_(1, drafts, numbers(drafts, 1))
        given = torch.cat([root, *in_beams[:-1]], dim=1)
        known = torch.full_like(pool, -1).scatter_(1, given[:, 1:], numbers(given[:, 1:], 1))
        mine = parent.gather(1, drafts)
        parents = torch.where(mine == 0, 0, tested.gather(1, given.gather(1, mine)))
        tree = Tree.of(torch.cat([root - 1, parents], dim=1), self.depth)
        fed = torch.cat([root, known.gather(1, drafts)], dim=1)
        return Drafted(tree, pool.gather(1, drafts), value.new_zeros(*fed.shape, 1), fed)


def numbers(like: Tensor, first: int) -> Tensor:
    """first, first + 1, ... in every row of [R, M]."""
    return torch.arange(first, first + like.shape[1], device=like.device).expand(len(like), -1)


def siblings(tree: Tree, most: int) -> Tensor:
    """The children [R, T, most] of every node, in their order in the tree, -1 after the last."""
    p = tree.parents
    before = (p[:, :, None] == p[:, None, :]).tril(-1).sum(-1)  # siblings that come first
    table = torch.full((*p.shape, most + 1), -1, device=p.device)
    rows = torch.arange(len(p), device=p.device)[:, None]
    node = torch.arange(p.shape[1], device=p.device).expand_as(p)
    table[rows, p[:, 1:], before[:, 1:].clamp_max(most)] = node[:, 1:]
    return table[..., :most]
