"""The exactness proof for models with two-way heads, whose distribution is their own: a diagonal given those before it.

The models are tables: logits of the cells of a diagonal for all that may stand in the diagonals before it. The
probability of every image comes from them by definition, and shares no code with the sampler.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from torch import Tensor

from visar.engine.guidance import Guidance
from visar.engine.layout import Layout
from visar.engine.session import Session
from visar.eval.exactness.tabular import Settings, reference_probs


@dataclass(frozen=True)
class DiagonalModel:
    """Logits `cond` and `uncond` of a diagonal's cells, [V**before, cells, V] for each diagonal in turn.

    `diagonals` are their cells (positions, from the top), and the first index is what stands before, base V, diagonal
    by diagonal.
    """

    layout: Layout
    vocab: int
    diagonals: tuple[tuple[int, ...], ...]
    cond: tuple[Tensor, ...]
    uncond: tuple[Tensor, ...]

    @staticmethod
    def of(layout: Layout, vocab: int, seed: int = 7, spread: float = 1.2) -> DiagonalModel:
        """Independent normal logits."""
        g = torch.Generator().manual_seed(seed)
        cells = itertools.product(range(layout.rows), range(layout.columns))
        by = sorted(cells, key=lambda cell: (sum(cell), cell[0]))
        diagonals = tuple(
            tuple(r * layout.columns + c for r, c in group) for _, group in itertools.groupby(by, key=sum)
        )
        before = list(itertools.accumulate((len(cells) for cells in diagonals), initial=0))
        shapes = [(vocab**n, len(cells), vocab) for n, cells in zip(before, diagonals, strict=False)]
        cond = tuple(torch.randn(shape, generator=g) * spread for shape in shapes)
        return DiagonalModel(
            layout, vocab, diagonals, cond, tuple(x + torch.randn(x.shape, generator=g) * spread / 2 for x in cond)
        )

    def joint(self, settings: Settings) -> np.ndarray:
        """The probability of every image, [V**N] float64, in the order of their values base V in raster order."""
        found = np.zeros(self.vocab**self.layout.length)
        order = [cell for cells in self.diagonals for cell in cells]

        def walk(d: int, before: list[int], probability: float) -> None:
            if d == len(self.diagonals):
                image = [token for _, token in sorted(zip(order, before, strict=True))]
                found[self._value(image)] = probability
                return
            # Guidance ends with a diagonal: as released, by the number of tokens before it.
            guided = settings.interval < 0 or len(before) <= settings.interval
            own = replace(settings, interval=-1, scale=settings.scale if guided else 1.0)
            cond, uncond = (table[d][self._value(before)].double().numpy() for table in (self.cond, self.uncond))
            each = [reference_probs(cond[i], uncond[i], cell, own) for i, cell in enumerate(self.diagonals[d])]
            for tokens in itertools.product(range(self.vocab), repeat=len(each)):
                if share := prod(p[token] for p, token in zip(each, tokens, strict=True)):
                    walk(d + 1, [*before, *tokens], probability * share)

        walk(0, [], 1.0)
        return found

    def _value(self, tokens: list[int]) -> int:
        return sum(token * self.vocab**n for n, token in enumerate(reversed(tokens)))


class DiagonalSession(Session):
    """Decode a `DiagonalModel`; what was fed stays, and is overwritten."""

    def __init__(self, model: DiagonalModel, batch: int, guidance: Guidance = Guidance()):
        super().__init__(batch, model.layout.length, model.vocab)
        self.model, self.guidance, self.layout = model, guidance, model.layout
        self.fed = torch.zeros(batch, self.length, dtype=torch.long)

    def forward_diagonal(self, tokens: Tensor) -> Tensor:
        cond, uncond = (torch.zeros(*tokens.shape, self.vocab) for _ in range(2))
        last: tuple[int, ...] = ()
        before: list[int] = []
        for cells, own, other in zip(self.model.diagonals, self.model.cond, self.model.uncond, strict=True):
            rows = (self.lengths == len(before)).nonzero()[:, 0]
            for i, cell in enumerate(last):
                self.fed[rows, cell] = tokens[rows, i]
            value = sum((self.fed[rows, cell] * self.vocab**n for n, cell in enumerate(reversed(before))), rows * 0)
            cond[rows, : len(cells)], uncond[rows, : len(cells)] = own[value], other[value]
            last, before = cells, [*before, *cells]
        if not self.guidance.active:
            return cond
        at = self.lengths + (self.lengths > 0)
        return self.guidance.combine(cond, uncond, at[:, None].expand(tokens.shape))

    def forward(self, tokens: Tensor, tree: object = None, first: int = 0) -> Tensor:
        raise NotImplementedError("by diagonals only")  # such tables have no raster order

    def place(self, row: int, fresh: Session) -> None:
        self.lengths[row] = 0
        self.fed[row] = 0

    def select(self, rows: Tensor) -> None:
        self.batch, self.lengths, self.fed = len(rows), self.lengths[rows], self.fed[rows]
