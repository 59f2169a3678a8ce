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
    i is j or above it.
    """

    parents: Tensor
    depths: Tensor
    ancestors: Tensor

    @staticmethod
    def of(parents: Tensor | Sequence[int]) -> Tree:
        """The tree of `parents` [T] or [R, T]; a `VisarError` for more than 63 nodes."""
        p = torch.as_tensor(parents, dtype=torch.long)
        p = p[None] if p.ndim == 1 else p
        if p.shape[1] > MOST_NODES:
            raise VisarError(f"A draft tree has at most {MOST_NODES} nodes with its root, not {p.shape[1]}.")
        depths, ancestors = torch.zeros_like(p), torch.ones_like(p)
        for j in range(1, p.shape[1]):
            above = p[:, j : j + 1]
            depths[:, j] = depths.gather(1, above)[:, 0] + 1
            ancestors[:, j] = ancestors.gather(1, above)[:, 0] | (1 << j)
        return Tree(p, depths, ancestors)

    def to(self, device: torch.device) -> Tree:
        return Tree(*(t.to(device) for t in self))

    def behind(self, nodes: int) -> Tree:
        """The same tree with a chain of `nodes` more before its root; what does not fit are leaves at its end."""
        if not nodes:
            return self
        chain = torch.arange(-1, nodes - 1, device=self.parents.device).expand(len(self.parents), -1)
        return Tree.of(torch.cat([chain, self.parents + nodes], dim=1)[:, :MOST_NODES].cpu()).to(self.parents.device)

    def sees(self, first: int, count: int, others: Tensor) -> Tensor:
        """Whether the nodes `first`.. see the nodes `others` [R, S], any integers: [R, count, S] bool."""
        inside = (others >= 0) & (others < self.parents.shape[1])
        bits = self.ancestors[:, first : first + count, None] >> others.clamp(0, MOST_NODES - 1).unsqueeze(-2)
        return (bits & 1).bool() & inside.unsqueeze(-2)
