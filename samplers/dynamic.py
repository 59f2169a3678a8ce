"""Chains of drafts that end where a rejection is likely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

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
from visar.samplers.speculative import Speculative, drafter_of
from visar.samplers.verification import StepNoise, Verified, accepts, replaced, sample

LEVELS = 24  # of entropy, half a nat each


@dataclass
class DynamicState(State):
    """`counts` [B, 2, levels]: drafts tested and drafts accepted, by the entropy of their draft distribution."""

    counts: Tensor


Rejection = Literal["chain", "draft"]


@register_sampler(
    "disco", paper="stop rule of DISCO, Mamou et al. 2024, arXiv:2405.04304", drafter="model", rejection="draft"
)
@register_sampler("specdec++", paper="stop rule of SpecDec++, Huang et al. 2024, arXiv:2405.19715", drafter="model")
@dataclass(frozen=True)
class DynamicSpeculative(Speculative):
    """A chain of 1 to `gamma` drafts that ends as soon as a `rejection` is more likely than `stop`: one anywhere in the
    "chain", or that of the last "draft" alone.

    The chain's, 1 - prod(a_i), is the rule of SpecDec++ (Huang et al. 2024, arXiv:2405.19715), the draft's that of
    DISCO (Mamou et al. 2024, arXiv:2405.04304). Both papers train a head that predicts the acceptance a_i of a draft;
    it is asked where the drafter has one (`visar train drafter --acceptance`). Otherwise each image counts as it goes,
    by the entropy of the draft distribution, so any drafter will do; a level of entropy without tests counts as always
    accepted. Exact: every draft that was sampled is tested, and whether one more is sampled depends on the prefix and
    the drafts before it. The host waits for the device after every draft.
    """

    gamma: int = option(8, "drafts in the longest chain", 1, 16)
    stop: float = option(0.5, "a chain ends where a rejection is more likely than this", 0.01, 0.99)
    rejection: Rejection = "chain"
    capturable: ClassVar[bool] = False  # the host chooses the length of a chain

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.verification != "token":
            raise VisarError('specdec++ tests tokens one by one; its verification must be "token".')
        if self.rejection not in get_args(Rejection):
            raise VisarError(f"Unknown rejection {self.rejection!r}; known: {', '.join(get_args(Rejection))}.")
        if not 0 < self.stop < 1:
            raise VisarError(f"stop must lie between 0 and 1, not {self.stop}.")

    def begin(self, session: Session, target: Target, noise: Noise) -> DynamicState:
        drafter_of(session, self.drafter)
        counts = torch.zeros(session.batch, 2, LEVELS, dtype=torch.float64, device=session.device)
        return DynamicState.empty(session, target, noise, self.window, counts=counts)

    def draft(
        self, drafter: Drafter, session: Session, state: DynamicState, at: Tensor, u: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Drafts [B, n], -1 after the end of a row's chain, and their distributions [B, n, V], 0 there."""
        tested, accepted = state.counts.unbind(1)
        rates = (accepted + 1) / (tested + 1)
        goes_on = torch.ones(session.batch, dtype=torch.bool, device=session.device)
        chance = torch.ones(session.batch, dtype=torch.float64, device=session.device)
        drafts, draft_probs = [], []
        logits = drafter.root(state.tokens, session.lengths)
        for i in range(self.gamma):
            probs = state.target.probs(logits, at[:, i : i + 1], drafted=True)
            draft = sample(probs, u[:, i : i + 1])
            drafts.append(torch.where(goes_on[:, None], draft, -1))
            draft_probs.append(torch.where(goes_on[:, None, None], probs, 0))
            predicted = drafter.chance(draft, probs)
            own = rates.gather(1, level(probs)) if predicted is None else predicted.double()
            chance = own.squeeze(1) * (chance if self.rejection == "chain" else 1)
            goes_on = goes_on & (1 - chance <= self.stop)
            if i + 1 == self.gamma or not bool(goes_on.any()):
                break
            logits = drafter.extend(drafts[-1].clamp_min(0), None, i + 1)
        return torch.cat(drafts, dim=1), torch.cat(draft_probs, dim=1)

    def verify(self, p: Tensor, q: Tensor, drafts: Tensor, noise: StepNoise, state: State) -> Verified:
        there = drafts.clamp_min(0)
        is_accepted = accepts(p[:, :-1], q, there, noise.accept[:, :-1]) & (drafts >= 0)
        return replaced(p, q, there, is_accepted, noise)  # after the end of a chain q is 0, and the residual p

    def learn(self, state: DynamicState, q: Tensor, drafts: Tensor, verified: Verified) -> None:
        column, first = torch.arange(drafts.shape[1], device=q.device), verified.accepted[:, None]
        tested = (drafts >= 0) & (column <= first)
        at = level(q)
        state.counts[:, 0].scatter_add_(1, at, tested.double())
        state.counts[:, 1].scatter_add_(1, at, (tested & (column < first)).double())


def level(probs: Tensor) -> Tensor:
    """The level of entropy [...] of distributions [..., V]."""
    return (-2 * torch.xlogy(probs, probs).sum(-1)).long().clamp(0, LEVELS - 1)
