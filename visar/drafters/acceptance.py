"""A head on a drafter's hidden states that predicts whether the target accepts a draft, and what it learns from.

SpecDec++ (Huang et al. 2024, arXiv:2405.19715) and DISCO (Mamou et al. 2024, arXiv:2405.04304) end a chain of drafts by
such a prediction. It is a function of the prefix and of drafts that were sampled, so whatever it says, a sampler that
tests all of these stays exact.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import torch
from torch import Tensor, nn

from visar.engine.component import Component
from visar.engine.layers import Linear, RMSNorm
from visar.reading import Positive, Size

ACCEPTANCE = "acceptance"  # its folder in that of the drafter
STATISTICS = 3


class AcceptanceHead(Component):
    """One hidden layer over a drafter's hidden state and, as in DISCO, numbers of the draft distribution.

    `weight` is that of a rejection in its loss, which `chance` takes back: its chances are those of the drafts.
    `drafter` is the `drafter_mark` of the one that it was trained for.
    """

    def __init__(self, dim: Size = 1280, width: Size = 64, weight: Positive = 6.0, drafter: str = ""):
        super().__init__()
        self.norm = RMSNorm(dim)
        self.inner = Linear(dim + STATISTICS, width)
        self.outer = Linear(width, 1)

    def logit(self, hidden: Tensor, numbers: Tensor) -> Tensor:
        """Logits [...] of the weighted chance, of hidden states [..., dim] and `statistics` [..., 3]."""
        x = torch.cat([self.norm(hidden.float()), numbers], dim=-1)
        return self.outer(self.inner(x, silu=True)).squeeze(-1).float()

    def chance(self, hidden: Tensor, numbers: Tensor) -> Tensor:
        """The chance [...] without the weight."""
        return (self.logit(hidden, numbers) + math.log(self.config.weight)).sigmoid()

    def forward(self, hidden: Tensor, drafts: Tensor, q: Tensor) -> Tensor:
        """The chance [B, M] that drafts [B, M] are accepted.

        They were sampled from q [B, M, V], of which `hidden` [B, M, dim] are the hidden states, of the conditional
        batch, that the drafter's output head read.
        """
        return self.chance(hidden, statistics(drafts, q))


def statistics(drafts: Tensor, q: Tensor) -> Tensor:
    """Of drafts [B, M] from q [B, M, V], in nats: the draft's and the largest log-probability, and the entropy."""
    own = q.gather(-1, drafts[..., None]).squeeze(-1)
    logs = torch.stack([own, q.amax(-1)], dim=-1).clamp_min(1e-9).log()
    return torch.cat([logs, -torch.xlogy(q, q).sum(-1, keepdim=True)], dim=-1)


def drafter_mark(drafter: Any) -> str:
    """A mark of a drafter that is the same in every dtype: a hash of the signs of its weights, or its configuration."""
    state = drafter.state_dict()
    signs = [state[key].signbit().cpu().numpy().tobytes() for key in sorted(state)]
    return hashlib.sha256(b"".join(signs) or json.dumps(dict(drafter.config)).encode()).hexdigest()[:16]


def give(drafter: nn.Module, head: AcceptanceHead) -> None:
    """Give a drafter its head, which is no submodule: it has a folder of its own."""
    object.__setattr__(drafter, "acceptance_head", head)


def head_of(drafter: Any) -> AcceptanceHead | None:
    """The head of a drafter, None if it has none."""
    return getattr(drafter, "acceptance_head", None)


def width_of(drafter: Any, target: Any) -> int:
    """The width of a drafter's hidden states, which is its target's where it has none of its own."""
    return int(drafter.config.get("dim", 0) or target.model.config.dim)
