"""Verification of draft trees: a walk from the root that accepts at most one child of each node.

The distributions p [B, T, V] are those of the target after each node, q [B, T, V] those that the children of each node
were sampled from. The rules differ in how the children of one node are tested, one after the other, in the order in
which they were sampled. Every rule gets the distribution that is still to be met, r, and the distribution that the
child at hand was sampled from, c, both [B, V], normalised.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from visar.samplers.verification import EQUAL, StepNoise, sample


class VerifiedTree(NamedTuple):
    """`path` [B, D]: accepted nodes, then -1; `tokens` [B, D + 1]: their tokens and one more; `accepted` [B]."""

    path: Tensor
    tokens: Tensor
    accepted: Tensor


class ChildRule(ABC):
    """How one child with token y [B], valid row by row, is tested. `reads_q`: whether it asks for q."""

    reads_q: bool = True

    def at_node(self, p: Tensor, q: Tensor, children: Tensor) -> Self:
        """The rule for the `children` [B] (their number) of nodes with the distributions p and q, both [B, V]."""
        return self

    @abstractmethod
    def accepts(self, r: Tensor, c: Tensor, y: Tensor, u: Tensor) -> Tensor:
        """Whether y is accepted, [B] bool, for uniforms u [B]."""

    @abstractmethod
    def left(self, r: Tensor, c: Tensor, y: Tensor) -> Tensor:
        """The distribution [B, V] that remains to be met once y was rejected; unnormalised."""

    def next_proposal(self, c: Tensor, y: Tensor) -> Tensor | None:
        """The distribution [B, V] of the next child, unnormalised; None where it is the same, or none is asked for."""
        return None


def at(probs: Tensor, y: Tensor) -> Tensor:
    """distribution[b, y[b]] in float64."""
    return probs.gather(-1, y[:, None]).squeeze(-1).double()


def without(probs: Tensor, y: Tensor) -> Tensor:
    """distribution [B, V] with the entries y [B] at zero."""
    return probs.scatter(-1, y[:, None], 0.0)


def normalised(weights: Tensor, otherwise: Tensor) -> Tensor:
    """weights [B, V] over their sum; `otherwise` where next to nothing is left of them."""
    total = weights.sum(-1, keepdim=True)
    return torch.where(total < EQUAL, otherwise, weights / total.clamp_min(EQUAL))


class Sampled(ChildRule):
    """Children sampled without replacement: recursive rejection (SpecInfer, Miao et al. 2023, arXiv:2305.09781). Exact.

    Child j was sampled from c, which is q without the children before it; on rejection (r - c)+ remains.
    """

    def accepts(self, r: Tensor, c: Tensor, y: Tensor, u: Tensor) -> Tensor:
        return u * at(c, y) < at(r, y)

    def left(self, r: Tensor, c: Tensor, y: Tensor) -> Tensor:
        return (r - c).clamp_min(0)

    def next_proposal(self, c: Tensor, y: Tensor) -> Tensor:
        return without(c, y)


class Chosen(ChildRule):
    """Children that are a function of the prefix, as the top-m of q are: c is a point mass. Exact."""

    reads_q = False

    def accepts(self, r: Tensor, c: Tensor, y: Tensor, u: Tensor) -> Tensor:
        return u < at(r, y)

    def left(self, r: Tensor, c: Tensor, y: Tensor) -> Tensor:
        return without(r, y)


@dataclass(frozen=True)
class Independent(ChildRule):
    """Children sampled from q independently of one another: k-SEQ (SpecTr, Sun et al. 2023, arXiv:2310.15141). Exact.

    Each of a node's k children may take `share` [B, V] = min(q, p / rho) of the target distribution, rho being the
    smallest divisor at which k of them cannot take more than there is.
    """

    share: Tensor | None = None

    def at_node(self, p: Tensor, q: Tensor, children: Tensor) -> Self:
        return type(self)(shared(p, q, children))

    def accepts(self, r: Tensor, c: Tensor, y: Tensor, u: Tensor) -> Tensor:
        assert self.share is not None
        return u * at(c, y) < at(self.share, y)

    def left(self, r: Tensor, c: Tensor, y: Tensor) -> Tensor:
        assert self.share is not None
        return (r - self.share).clamp_min(0)


def shared(p: Tensor, q: Tensor, children: Tensor, steps: int = 40) -> Tensor:
    """min(q, p / rho) [B, V], float64, for the smallest rho with 1 - (1 - b)^k <= rho b, b = sum min(q, p / rho).

    k is `children` [B]. rho lies between 1 and k, and is found by bisection; it is never below the true one.
    """
    p, q = p.double(), q.double()
    k = children.clamp_min(1).double()[:, None]
    low, high = torch.ones_like(k), k
    for _ in range(steps):
        rho = (low + high) / 2
        taken = torch.minimum(q * rho, p).sum(-1, keepdim=True)
        enough = taken >= 1 - (1 - taken / rho).clamp_min(0) ** k
        low, high = torch.where(enough, low, rho), torch.where(enough, rho, high)
    return torch.minimum(q, p / high)


def most_likely(q: Tensor, count: int) -> Tensor:
    """The `count` most likely tokens [..., count] of q [..., V] in fp32, in descending order, the first of equal ones.

    `topk` takes any of the equal ones, of which logits in bfloat16 have many, and another device takes others.
    """
    behind = torch.arange(q.shape[-1] - 1, -1, -1, device=q.device)
    ranked = q.contiguous().view(torch.int32).long() << 32 | behind  # bits of positive floats are in their order
    return ranked.topk(count).indices


def sample_children(q: Tensor, u: Tensor) -> Tensor:
    """Tokens [..., C] sampled one after the other from q [..., V] without replacement, for uniforms u [..., C].

    Where the distribution has fewer than C tokens, the missing ones are -1.
    """
    c = q.clone()
    out = []
    for column in u.unbind(-1):
        y = sample(c, column)
        out.append(torch.where(c.sum(-1) > 0, y, -1))
        c.scatter_(-1, y[..., None], 0.0)
    return torch.stack(out, -1)


def verify_tree(
    p: Tensor, q: Tensor, tokens: Tensor, children: Tensor, depth: int, noise: StepNoise, rule: ChildRule
) -> VerifiedTree:
    """Walk down a tree of `depth` levels.

    `tokens` [B, T] of the nodes, -1 where there is none; `children` [R, T, C], the children of each node in draft
    order, -1 after the last; `uniforms.accept` [B, T], one for each node's own test, `uniforms.sample` [B, depth + 1],
    one for the last token at each depth. The path is at most as long as the tree is deep; exactness is that of `rule`.
    """
    batch = torch.arange(len(p), device=p.device)
    children = children.expand(len(p), -1, -1)
    node = torch.zeros_like(batch)
    alive = torch.ones_like(batch, dtype=torch.bool)
    accepted = torch.zeros_like(batch)
    path, out = [], []
    r = p[:, 0]
    for level in range(depth):
        c = q[batch, node]
        here = torch.full_like(node, -1)  # the child that is accepted
        below = children[batch, node]
        there = (below >= 0) & (tokens.gather(1, below.clamp_min(0)) >= 0)
        node_rule = rule.at_node(r, c, there.sum(-1))
        for child in below.unbind(-1):
            y = tokens[batch, child.clamp_min(0)]
            tested = alive & (here < 0) & (child >= 0) & (y >= 0)
            y = y.clamp_min(0)
            is_accepted = tested & node_rule.accepts(r, c, y, noise.accept[batch, child.clamp_min(0)])
            fails = (tested & ~is_accepted)[:, None]
            here = torch.where(is_accepted, child, here)
            r = torch.where(fails, normalised(node_rule.left(r, c, y), r), r)
            if (rest := node_rule.next_proposal(c, y)) is not None:
                # However small: what remains of q is what the next child was sampled from.
                total = rest.sum(-1, keepdim=True)
                c = torch.where(fails & (total > 0), rest / total.clamp_min(torch.finfo(rest.dtype).tiny), c)
        found = here >= 0
        last = sample(r, noise.sample[:, level])
        out.append(torch.where(found, tokens[batch, here.clamp_min(0)], last))
        path.append(here)
        node = torch.where(found, here, node)
        accepted += found
        alive = found
        r = torch.where(found[:, None], p[batch, node], r)
    out.append(sample(r, noise.sample[:, depth]))
    return VerifiedTree(torch.stack(path, 1), torch.stack(out, 1), accepted)
