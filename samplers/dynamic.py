"""Chains of drafts whose length follows what is expected of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from visar.engine.drafter import Drafter
from visar.engine.rng import Noise
from visar.engine.session import Session
from visar.errors import VisarError
from visar.samplers.base import State
from visar.samplers.distribution import Target
from visar.samplers.parameters import option
from visar.samplers.registry import register_sampler
from visar.samplers.speculative import Speculative
from visar.samplers.verification import Coins, Verdict, draw, keeps, replaced

LEVELS = 24  # of entropy, half a nat each


@register_sampler("specdec++", paper="stop rule of SpecDec++, Huang et al. 2024, arXiv:2405.19715", drafter="model")
@dataclass(frozen=True)
class DynamicSpeculative(Speculative):
    """A chain of 1 to `gamma` drafts that ends as soon as a rejection in it is more likely than `stop`.

    The threshold on 1 - prod(a_i) is that of SpecDec++ (Huang et al. 2024, arXiv:2405.19715). Where the paper trains a
    head to predict the acceptance a_i of a draft, here each image counts it as it goes, by the entropy of the draft
    law, so any drafter will do; what was never tried is expected to stand. Exact: what was drawn is always tested, and
    whether one more draft is drawn depends on what came before it. The host waits for the device after every draft.
    """

    gamma: int = option(8, "drafts in the longest chain", 1, 16)
    stop: float = option(0.5, "a chain ends where a rejection is more likely than this", 0.01, 0.99)
    capturable: ClassVar[bool] = False  # how long a chain gets is decided by the host

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.verification != "token":
            raise VisarError('specdec++ tests tokens one by one; its verification must be "token".')
        if not 0 < self.stop < 1:
            raise VisarError(f"stop must lie between 0 and 1, not {self.stop}.")

    def begin(self, session: Session, target: Target, noise: Noise) -> State:
        state = super().begin(session, target, noise)
        state.seen = torch.zeros(2, session.batch, LEVELS, dtype=torch.float64, device=session.device)
        return state

    def draft(self, drafter: Drafter, session: Session, state: State, at: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Drafts [B, n], -1 behind the end of a row's chain, and their laws [B, n, V], 0 there."""
        assert state.seen is not None
        tested, stood = state.seen
        rates = (stood + 1) / (tested + 1)
        goes_on = torch.ones(session.batch, dtype=torch.bool, device=session.device)
        chance = torch.ones(session.batch, dtype=torch.float64, device=session.device)
        drafts, laws = [], []
        logits = drafter.root(state.tokens, session.lengths)
        for i in range(self.gamma):
            law = state.target.probs(logits, at[:, i : i + 1])
            drafts.append(torch.where(goes_on[:, None], draw(law, u[:, i : i + 1]), -1))
            laws.append(torch.where(goes_on[:, None, None], law, 0))
            chance = chance * rates.gather(1, level(law)).squeeze(1)
            goes_on = goes_on & (1 - chance <= self.stop)
            if i + 1 == self.gamma or not bool(goes_on.any()):
                break
            logits = drafter.extend(drafts[-1].clamp_min(0), None, i + 1)
        return torch.cat(drafts, dim=1), torch.cat(laws, dim=1)

    def verify(self, p: Tensor, q: Tensor, drafts: Tensor, coins: Coins) -> Verdict:
        there = drafts.clamp_min(0)
        kept = keeps(p[:, :-1], q, there, coins.accept[:, :-1]) & (drafts >= 0)
        return replaced(p, q, there, kept, coins)  # behind the end of a chain q is 0, and the residual p

    def learn(self, state: State, q: Tensor, drafts: Tensor, verdict: Verdict) -> None:
        assert state.seen is not None
        column, first = torch.arange(drafts.shape[1], device=q.device), verdict.accepted[:, None]
        tested = (drafts >= 0) & (column <= first)
        at = level(q)
        state.seen[0].scatter_add_(1, at, tested.double())
        state.seen[1].scatter_add_(1, at, (tested & (column < first)).double())


def level(law: Tensor) -> Tensor:
    """The level of entropy [...] of laws [..., V]."""
    return (-2 * torch.xlogy(law, law).sum(-1)).long().clamp(0, LEVELS - 1)
