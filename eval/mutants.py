"""Mistakes that published samplers make, planted on purpose: `visar verify` must catch every one of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from visar.samplers.base import Sampler, State
from visar.samplers.jacobi import SpeculativeJacobi
from visar.samplers.verification import Coins, Verdict, draw, keeps, leading, race, residual


@dataclass(frozen=True)
class StaleLaw(SpeculativeJacobi):
    """A draft that stood behind the first rejection keeps the law it was drawn from a pass earlier."""

    def next_laws(self, p: Tensor, q: Tensor, verdict: Verdict, inputs: Tensor) -> Tensor:
        kept = (verdict.tokens[:, :-1] == inputs[:, 1:])[..., None]
        return torch.cat([torch.where(kept, q, p[:, :-1]), p[:, -1:]], dim=1)


@dataclass(frozen=True)
class RewarpedResidual(SpeculativeJacobi):
    """The residual goes through temperature, top-k and top-p a second time."""

    def verify(self, p: Tensor, q: Tensor, drafts: Tensor, coins: Coins, state: State) -> Verdict:
        kept = keeps(p[:, :-1], q, drafts, coins.accept[:, :-1])
        r = residual(p[:, :-1], q)
        positions = torch.zeros(r.shape[:2], dtype=torch.long)
        again = replace(state.target, forced=None).probs(r.log(), positions)
        fresh = draw(torch.cat([again, p[:, -1:]], dim=1), coins.draw)
        return Verdict(torch.cat([torch.where(kept, drafts, fresh[:, :-1]), fresh[:, -1:]], dim=1), leading(kept))


@dataclass(frozen=True)
class NoResidual(SpeculativeJacobi):
    """A rejected draft is replaced by a draw from p."""

    def verify(self, p: Tensor, q: Tensor, drafts: Tensor, coins: Coins, state: State) -> Verdict:
        kept = keeps(p[:, :-1], q, drafts, coins.accept[:, :-1])
        fresh = draw(p, coins.draw)
        return Verdict(torch.cat([torch.where(kept, drafts, fresh[:, :-1]), fresh[:, -1:]], dim=1), leading(kept))


@dataclass(frozen=True)
class ReusedGumbel(SpeculativeJacobi):
    """The residual is drawn with the very noise that drew the rejected draft."""

    def verify(self, p: Tensor, q: Tensor, drafts: Tensor, coins: Coins, state: State) -> Verdict:
        assert coins.race is not None
        verdict = super().verify(p, q, drafts, coins, state)
        column = torch.arange(drafts.shape[1])
        rejected = column == verdict.accepted[:, None]
        again = race(residual(p[:, :-1], q), coins.race[:, :-1])
        tokens = verdict.tokens.clone()
        tokens[:, :-1] = torch.where(rejected, again, tokens[:, :-1])
        return Verdict(tokens, verdict.accepted)


@dataclass(frozen=True)
class LongestPath(SpeculativeJacobi):
    """The chain is tested twice with independent coins, and the longer outcome is taken."""

    def verify(self, p: Tensor, q: Tensor, drafts: Tensor, coins: Coins, state: State) -> Verdict:
        one = super().verify(p, q, drafts, coins, state)
        other = super().verify(p, q, drafts, coins._replace(accept=1 - coins.accept, draw=1 - coins.draw), state)
        longer = other.accepted > one.accepted
        return Verdict(
            torch.where(longer[:, None], other.tokens, one.tokens), torch.where(longer, other.accepted, one.accepted)
        )


@dataclass(frozen=True)
class Mutant:
    """A wrong sampler and the case of `visar.eval.exactness` in which it shows."""

    name: str
    sampler: Sampler
    case: str


MUTANTS = (
    Mutant("stale draft law", StaleLaw(coupling="maximal"), "plain"),
    Mutant("residual re-warped (T)", RewarpedResidual(coupling="maximal"), "temperature 0.6"),
    Mutant("residual re-warped (top-p)", RewarpedResidual(), "top-p 0.7"),
    Mutant("residual replaced by p", NoResidual(), "plain"),
    Mutant("Gumbel noise reused", ReusedGumbel(coupling="gumbel"), "top-p 0.7"),
    Mutant("longest path", LongestPath(), "plain"),
)
