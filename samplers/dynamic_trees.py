"""Beam trees that grow as far as it pays: by the probability of the beam, or by what was accepted before."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from visar.engine.rng import Noise, Purpose
from visar.engine.session import Session
from visar.errors import VisarError
from visar.samplers.base import State
from visar.samplers.beam_tree import LATER, BeamState, BeamTree, Drafted
from visar.samplers.distribution import Target
from visar.samplers.dynamic import LEVELS, level
from visar.samplers.parameters import option
from visar.samplers.registry import register_sampler
from visar.samplers.speculative import Children, drafter_of
from visar.samplers.tree_verification import VerifiedTree

DECIMALS = 6  # of logarithms of chances that are compared


@register_sampler("ddd", paper="DDD, Brown et al. 2024, arXiv:2409.00142", drafter="eagle")
@dataclass(frozen=True)
class DynamicDepth(BeamTree):
    """EAGLE-2's tree, which ends where the nodes of the beam have a probability below `mass` together.

    Dynamic depth decoding (DDD, Brown et al. 2024, arXiv:2409.00142) looks at some depths, this at every one. Exact:
    the tree is a function of the prefix. The host waits for the device after every level.
    """

    mass: float = option(0.5, "the tree ends where the beam is less probable than this", 0.001, 0.999)
    capturable: ClassVar[bool] = False  # the host chooses the depth

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.children != "chosen":
            raise VisarError(f'ddd is for "chosen" children, whose beam has a probability, not {self.children!r} ones.')
        if not 0 < self.mass < 1:
            raise VisarError(f"mass must lie between 0 and 1, not {self.mass}.")

    def goes_on(self, score: Tensor) -> bool:
        return bool(self._enough(score).any())

    def _enough(self, score: Tensor) -> Tensor:
        return score.exp().sum(1) >= self.mass

    def _ranked(self, joint: Tensor, score: Tensor, session: Session, state: State, first: int) -> Tensor:
        return torch.where(self._enough(score)[:, None, None], joint, -torch.inf)


@dataclass
class CountedState(BeamState):
    """`counts` [B, 2, levels, ranks]: children tested and accepted, by the entropy of their distribution and rank."""

    counts: Tensor


@register_sampler("dyspec", paper="DySpec, Xiong et al. 2024, arXiv:2410.11744", drafter="eagle")
@dataclass(frozen=True)
class CalibratedTree(BeamTree):
    """A tree of sampled children that is grown where a draft is likely to be accepted (DySpec, Xiong et al. 2024,
    arXiv:2410.11744), level by level.

    A draft is worth the chance that verification comes to it and accepts it. Drafts worth less than `least` are not
    sampled, and of others the `beam` best of a level. DySpec takes the draft probability of a token for that
    chance, which on a distribution over thousands of codes is far too low. Here each image counts how often the child
    of a rank is accepted, by the entropy of its distribution. Exact: what a draft is worth is known before it is
    sampled, and every draft that was sampled is tested. The host waits for the device after every level.
    """

    nodes: int = 0
    children: Children = "sampled"
    least: float = option(0.05, "a draft that is accepted with a lower chance is not sampled", 0.001, 0.5)
    capturable: ClassVar[bool] = False  # the host chooses the depth

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.children != "sampled":
            raise VisarError(f'dyspec is for "sampled" children, not {self.children!r} ones.')
        if not 0 < self.least < 1:
            raise VisarError(f"least must lie between 0 and 1, not {self.least}.")

    def begin(self, session: Session, target: Target, noise: Noise) -> CountedState:
        drafter_of(session, self.drafter)
        counts = torch.zeros(session.batch, 2, LEVELS, self.beam, dtype=torch.float64, device=session.device)
        return CountedState.empty(session, target, noise, self.window, rule=self.rule(session), counts=counts)

    def goes_on(self, score: Tensor) -> bool:
        return bool((score > -torch.inf).any())

    def _ranked(self, joint: Tensor, score: Tensor, session: Session, state: State, first: int) -> Tensor:
        """Gumbel noise on log-probabilities: its order is that of sampling without replacement."""
        at = session.positions(first + joint.shape[1])[:, first:]  # of the noise: one for each node, whatever its depth
        return joint - state.noise.exponential(Purpose.DRAFT, at, state.passes, session.vocab).double().log()

    def _values(self, ranks: Tensor, q: Tensor, score: Tensor, state: CountedState) -> Tensor:
        rate = (state.counts[:, 1] + 1) / (state.counts[:, 0] + 1)
        reached = torch.cat([torch.ones_like(rate[..., :1]), (1 - rate[..., :-1]).cumprod(-1)], dim=-1)
        chance = (reached * rate).cummin(-1).values  # no child without the one before it
        rows = torch.arange(len(q), device=q.device)[:, None]
        # Products of the same few chances are often equal, and rounding must not say which of them is less.
        own = (score[..., None] + chance[rows, level(q)][..., : ranks.shape[-1]].log()).round(decimals=DECIMALS)
        worth = own - LATER * torch.arange(ranks.shape[-1], device=q.device)
        return torch.where(torch.isneginf(ranks) | (own < round(math.log(self.least), DECIMALS)), -torch.inf, worth)

    def learn(self, state: CountedState, drafted: Drafted, children: Tensor, verified: VerifiedTree) -> None:
        rows = torch.arange(len(children), device=children.device)
        node, alive = torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool)
        there = torch.nn.functional.pad(drafted.tokens >= 0, (1, 0), value=True)
        for found in verified.path.unbind(1):
            below = children[rows, node]
            accepted = (below == found[:, None]) & (found >= 0)[:, None]
            before = accepted.long().cumsum(1) - accepted.long()  # 1 for children that come after the accepted one
            tested = (below >= 0) & there.gather(1, below.clamp_min(0)) & (before == 0) & alive[:, None]
            at = level(drafted.q[rows, node])
            state.counts[rows, 0, at] += tested
            state.counts[rows, 1, at] += accepted
            alive = found >= 0
            node = torch.where(alive, found, node)
