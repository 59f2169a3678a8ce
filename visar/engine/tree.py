"""Draft trees as tensors: parents, depths and packed ancestor sets, one tree for all rows or one per row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from visar.errors import VisarError

MOST_NODES = 63  # ancestor sets are the bits of one int64


class Tree(NamedTuple):
    """T nodes of R trees, R being 1 or the batch. Node 0 is the root, the last committed token; a parent comes first.

    `parents` [R, T], -1 for the root; `depths` [R, T]; `ancestors` [R, T], int64, of which bit i of node j is set where
    i is j or an ancestor of j.
    """

    parents: Tensor
    depths: Tensor
    ancestors: Tensor

    @staticmethod
    def of(parents: Tensor | Sequence[int], depth: int | None = None) -> Tree:
        """The tree of `parents` [T] or [R, T], at most `depth` deep. Raises `VisarError` for more than 63 nodes."""
        p = torch.as_tensor(parents, dtype=torch.long)
        p = p[None] if p.ndim == 1 else p
        if p.shape[1] > MOST_NODES:
            raise VisarError(f"A draft tree has at most {MOST_NODES} nodes with its root, not {p.shape[1]}.")
        own = (1 << torch.arange(p.shape[1], device=p.device)).expand_as(p)
        above, inner = p.clamp_min(0), p >= 0
        depths, ancestors = torch.zeros_like(p), own
        for _ in range(p.shape[1] - 1 if depth is None else depth):
            depths = torch.where(inner, depths.gather(1, above) + 1, 0)
            ancestors = torch.where(inner, ancestors.gather(1, above) | own, own)
        return Tree(p, depths, ancestors)

    def to(self, device: torch.device) -> Tree:
        return Tree(*(t.to(device) for t in self))

    def after(self, nodes: int) -> Tree:
        """This tree after a sequence of `nodes` more. Nodes beyond 63, the last leaves, are dropped."""
        if not nodes:
            return self
        before = Tree.of(torch.arange(-1, nodes - 1, device=self.parents.device))
        moved = (self.parents + nodes, self.depths + nodes, self.ancestors << nodes | (1 << nodes) - 1)
        both = (torch.cat([a.expand(len(b), -1), b], dim=1) for a, b in zip(before, moved, strict=True))
        return Tree(*(t[:, :MOST_NODES] for t in both))

    def ancestor_mask(self, first: int, count: int, others: Tensor) -> Tensor:
        """[R, count, S], bool: whether each of the nodes `first`.. is or descends from the nodes `others` [R, S]."""
        inside = (others >= 0) & (others < self.parents.shape[1])
        bits = self.ancestors[:, first : first + count, None] >> others.clamp(0, MOST_NODES - 1).unsqueeze(-2)
        return (bits & 1).bool() & inside.unsqueeze(-2)
