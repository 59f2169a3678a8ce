"""Relaxed acceptance by a threshold: a draft is accepted where it is likely enough, or near enough to the best token.

There is no ratio of probabilities and no residual, so the draft distribution does not matter, and nothing bounds how
far the images' distribution moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from visar.engine.rng import Noise
from visar.engine.session import Session
from visar.errors import VisarError
from visar.samplers.base import State
from visar.samplers.distribution import Target
from visar.samplers.parameters import option
from visar.samplers.registry import register_sampler
from visar.samplers.relaxed import nearest_codes
from visar.samplers.speculative import Children, Speculative, TreeSpeculative, drafter_of
from visar.samplers.tree_verification import ChildRule, at
from visar.samplers.verification import StepNoise, Verified, leading


@dataclass(frozen=True)
class LikelyEnough(ChildRule):
    """A child is accepted where p(y) is above `least` [B] = min(epsilon, delta exp(-H(p))); else p stays as it is."""

    epsilon: float
    delta: float
    least: Tensor | None = None
    reads_q: ClassVar[bool] = False  # type: ignore[misc]

    def at_node(self, p: Tensor, q: Tensor, children: Tensor) -> Self:
        entropy = -torch.xlogy(p.double(), p.double()).sum(-1)
        least = (self.delta * torch.exp(-entropy)).clamp_max(self.epsilon)
        return type(self)(self.epsilon, self.delta, least)

    def accepts(self, r: Tensor, c: Tensor, y: Tensor, u: Tensor) -> Tensor:
        assert self.least is not None
        return at(r, y) > self.least

    def left(self, r: Tensor, c: Tensor, y: Tensor) -> Tensor:
        return r


@register_sampler(
    "typical", paper="typical acceptance of Medusa, Cai et al. 2024, arXiv:2401.10774", exact=False, drafter="medusa"
)
@dataclass(frozen=True)
class Typical(TreeSpeculative):
    """Typical acceptance (Medusa, Cai et al. 2024, arXiv:2401.10774): a draft y is accepted where
    p(y) > min(`epsilon`, `delta` exp(-H(p))), H being the entropy of p.

    The first child of a node that is accepted is taken, the most likely one first; after the last one a token is
    sampled from p. At `epsilon` 1 only certain tokens are accepted, and nothing is relaxed.
    """

    tree: str = option("4x2x1", "its shape: mc25, ext57, or children per depth as in 4x2x1")
    children: Children = "chosen"
    epsilon: float = option(0.09, "the probability that is always enough; 1 is exact", 0.001, 1)
    delta: float = option(0.3, "the share of exp(-entropy) that is enough", 0.001, 1000)
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.children != "chosen":
            raise VisarError(f'typical accepts by a threshold, for "chosen" children, not {self.children!r} ones.')
        for name, value, most in (("epsilon", self.epsilon, 1.0), ("delta", self.delta, 1e9)):
            if not 0 < value <= most:
                raise VisarError(f"{name} must be above 0 and at most {most:g}, not {value}.")

    def rule(self, session: Session) -> ChildRule:
        return LikelyEnough(self.epsilon, self.delta)


@dataclass
class NearState(State):
    """`table` [V, near]: the nearest codes of each code."""

    table: Tensor


@register_sampler(
    "blockwise", paper="Stern et al. 2018, arXiv:1811.03115, with a tolerance", exact=False, drafter="medusa", gamma=3
)
@dataclass(frozen=True)
class Blockwise(Speculative):
    """Greedy blockwise decoding (Stern et al. 2018, arXiv:1811.03115) with a distance tolerance.

    The drafter's most likely tokens are accepted while each is the most likely token of p, or among its `near` nearest
    codes. It does not sample; at `near` 0 it gives the image of greedy decoding.
    """

    near: int = option(8, "codes nearest to the most likely one that pass for it; 0 for none", 0, 1000)
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.verification != "token":
            raise VisarError('blockwise compares single tokens; its verification must be "token".')
        if self.near < 0:
            raise VisarError(f"near must be 0 or more codes, not {self.near}.")

    def begin(self, session: Session, target: Target, noise: Noise) -> NearState:
        drafter_of(session, self.drafter)
        none = torch.empty(session.vocab, 0, dtype=torch.long, device=session.device)
        table = nearest_codes(session, self.near) if self.near else none
        return NearState.empty(session, target, noise, self.window, table=table)

    def choose(self, q: Tensor, u: Tensor) -> Tensor:
        return q.argmax(-1)

    def verify(self, p: Tensor, q: Tensor, drafts: Tensor, noise: StepNoise, state: NearState) -> Verified:
        best = p.argmax(-1)
        wanted = best[:, :-1, None]
        passing = torch.cat([wanted, state.table[wanted.squeeze(-1)]], dim=-1)
        accepted = leading((passing == drafts[..., None]).any(-1))
        tokens = best.clone()
        column = torch.arange(drafts.shape[1], device=p.device)
        tokens[:, :-1] = torch.where(column < accepted[:, None], drafts, best[:, :-1])
        return Verified(tokens, accepted)
