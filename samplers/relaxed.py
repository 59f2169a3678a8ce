"""Relaxed acceptance: faster than exact verification, and the images have another distribution. Each says so, by name.

What each parameter does to the distribution is measured in `docs/relaxed.md`. At its neutral value, every rule here
accepts the same drafts as the exact rule that it relaxes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from visar.engine.session import Session
from visar.errors import VisarError
from visar.kernels.aggregate import pool
from visar.samplers.base import State
from visar.samplers.beam_tree import BeamTree
from visar.samplers.jacobi import SpeculativeJacobi
from visar.samplers.neighbours import neighbours
from visar.samplers.parameters import option
from visar.samplers.registry import register_sampler
from visar.samplers.speculative import Speculative, TreeSpeculative
from visar.samplers.tree_verification import ChildRule, at
from visar.samplers.verification import StepNoise, Verified, replaced


@dataclass(frozen=True)
class Pooled(ChildRule):
    """A child's probability is raised by that of its nearest codes, as far as a budget allows.

    `table` [V, k]: neighbours, nearest first. The first n neighbours are pooled for the largest n at which their mass
    in r is within `budget` + `share` * r(y). `rule` is the exact one that is relaxed. What was pooled
    for a rejected child is spent.
    """

    table: Tensor
    rule: ChildRule
    budget: float = 0.0
    share: float = 0.0

    @property
    def reads_q(self) -> bool:  # type: ignore[override]
        return self.rule.reads_q

    def pooled(self, r: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The pooled mass [B], and r^y [B, V]: r with that mass moved to y."""
        return pool(r, y, self.table, self.budget, self.share)

    def accepts(self, r: Tensor, c: Tensor, y: Tensor, u: Tensor) -> Tensor:
        proposal = at(c, y) if self.reads_q else 1.0
        return u * proposal < at(r, y) + self.pooled(r, y)[0]

    def left(self, r: Tensor, c: Tensor, y: Tensor) -> Tensor:
        return self.rule.left(self.pooled(r, y)[1], c, y)

    def next_proposal(self, c: Tensor, y: Tensor) -> Tensor | None:
        return self.rule.next_proposal(c, y)


def codebook_of(session: Session) -> Tensor:
    if session.codebook is None:
        raise VisarError("This sampler pools codes that look alike, and the model has no codebook.")
    return session.codebook


def nearest_codes(session: Session, k: int) -> Tensor:
    """The table of the k nearest codes of the session's tokenizer, or of all others where it has fewer."""
    codes = codebook_of(session)
    return neighbours(codes, min(k, len(codes) - 1))


def check_neighbours(k: int) -> None:
    if k < 1:
        raise VisarError(f"k must be 1 or more neighbours, not {k}.")


@register_sampler("lantern", paper="Jang et al. 2024, arXiv:2410.03355", exact=False, drafter="eagle")
@dataclass(frozen=True)
class Lantern(BeamTree):
    """LANTERN (Jang et al. 2024, arXiv:2410.03355): the `k` nearest codes are pooled while their mass is below `delta`.

    The tree is EAGLE-2's. `delta` bounds how far one test moves the distribution of one child; it does not bound
    how far the image's distribution moves.
    """

    k: int = option(1000, "codes nearest to a draft that are pooled with it", 1, 16384)
    delta: float = option(0.1, "the most that one test moves the distribution of one draft", 0.01, 0.99)
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_neighbours(self.k)
        if not 0 < self.delta < 1:
            raise VisarError(f"delta must lie between 0 and 1, not {self.delta}; for exact decoding use 'eagle2'.")

    def rule(self, session: Session) -> ChildRule:
        return Pooled(nearest_codes(session, self.k), super().rule(session), budget=self.delta)


@register_sampler("lantern++", paper="Park et al. 2025, arXiv:2502.06352", exact=False, drafter="eagle")
@dataclass(frozen=True)
class LanternPlusPlus(TreeSpeculative):
    """LANTERN++ (Park et al. 2025, arXiv:2502.06352): a static tree, and up to `lam` times a child's own mass."""

    k: int = option(10, "codes nearest to a draft that are pooled with it", 1, 1000)
    lam: float = option(2.0, "how many times its own mass a draft may have; 1 is exact", 1, 10)
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_neighbours(self.k)
        if self.children == "independent":
            raise VisarError('lantern++ relaxes "sampled" or "chosen" children, not "independent" ones.')
        if not self.lam >= 1:
            raise VisarError(f"lam must be 1 or more, not {self.lam}; at 1 nothing is relaxed.")

    def rule(self, session: Session) -> ChildRule:
        return Pooled(nearest_codes(session, self.k), super().rule(session), share=self.lam - 1)


@register_sampler(
    "bild",
    paper="after BiLD, Kim et al. 2023, arXiv:2302.07863",
    exact=False,
    drafter="model",
    gamma=4,
    omega=2.0,
    nu=0.0,
)
@register_sampler("cool-sd", paper="COOL-SD, arXiv:2601.09212", exact=False, drafter="eagle")
@dataclass(frozen=True)
class CoolSD(Speculative):
    """Annealed relaxation (COOL-SD, 2026, arXiv:2601.09212): draft i is accepted with min(1, w_i p/q).

    w_i = max(1, `omega` exp(-`nu` i)), so that early drafts are relaxed most. The residual stays (p - q)+. With a small
    model as drafter and one weight for all drafts it is BiLD's rule (Kim et al. 2023, arXiv:2302.07863) without its
    scale: BiLD's small model goes on while its largest probability is above a threshold, which a distribution over
    thousands of codes never has.
    """

    gamma: int = option(5, "drafts in a chain", 1, 16)
    drafter: str = "eagle"
    omega: float = option(1.1, "how far the first draft is relaxed; 1 is exact", 1, 10)
    nu: float = option(0.7, "how fast later drafts are relaxed less", 0, 10)
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.verification != "token":
            raise VisarError('cool-sd relaxes the test of single tokens; its verification must be "token".')
        if not 1 <= self.omega < math.inf:
            raise VisarError(f"omega must be 1 or more, not {self.omega}; at 1 nothing is relaxed.")
        if not 0 <= self.nu < math.inf:
            raise VisarError(f"nu must be 0 or more, not {self.nu}.")

    def verify(self, p: Tensor, q: Tensor, drafts: Tensor, noise: StepNoise, state: State) -> Verified:
        w = (self.omega * torch.exp(-self.nu * torch.arange(self.gamma, device=p.device))).clamp_min(1).double()
        index = drafts.unsqueeze(-1)
        own, proposed = (probs.gather(-1, index).squeeze(-1).double() for probs in (p[:, :-1], q))
        is_accepted = noise.accept[:, :-1] * proposed < w * own
        return replaced(p, q, drafts, is_accepted, noise)


@register_sampler("gsd", paper="GSD, So et al. 2025", exact=False)
@dataclass(frozen=True)
class GroupedJacobi(SpeculativeJacobi):
    """Grouped speculative decoding (GSD, So et al. 2025): a Jacobi draft is tested as the group of tokens around it.

    The group is the draft and the `group` - 1 tokens nearest to it in rank under p, less those whose probability
    differs by `gap` or more. A draft that p gives no probability is not accepted, unlike in the released code.
    """

    group: int = option(14, "tokens that are tested together with a draft; 1 is exact", 1, 128)
    gap: float = option(0.15, "the most that their probabilities may differ", 0.01, 1)
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coupling != "independent":
            raise VisarError(f"gsd relaxes the independent coupling, and has no form for {self.coupling!r}.")
        if self.group < 1:
            raise VisarError(f"group must be 1 or more tokens, not {self.group}; at 1 nothing is relaxed.")
        if not self.gap > 0:
            raise VisarError(f"gap must be above 0, not {self.gap}.")

    def verify(self, p: Tensor, q: Tensor, drafts: Tensor, noise: StepNoise, state: State) -> Verified:
        target, size = p[:, :-1], min(self.group, p.shape[-1])
        order = target.argsort(dim=-1, descending=True, stable=True)
        index = drafts.unsqueeze(-1)
        rank = (order == index).long().argmax(-1, keepdim=True)
        first = (rank - size // 2).clamp(0, p.shape[-1] - size)
        members = order.gather(-1, first + torch.arange(size, device=p.device))
        own = target.gather(-1, index)
        near = ((target.gather(-1, members) - own).abs() < self.gap) | (members == index)
        mass = [torch.where(near, probs.gather(-1, members), 0).double().sum(-1) for probs in (target, q)]
        is_accepted = (noise.accept[:, :-1] * mass[1] < mass[0]) & (own.squeeze(-1) > 0)
        return replaced(p, q, drafts, is_accepted, noise)
