"""The session of a LlamaGen with two-way heads: a pass feeds a diagonal, and predicts the next one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from visar.engine.diagonals import Diagonals, Neighbours, width_of
from visar.engine.layout import Layout
from visar.engine.tree import Tree
from visar.errors import VisarError
from visar.families.llamagen.session import LlamaGenSession
from visar.families.llamagen.two_way import TwoWayLlamaGen

RASTER = (
    "A model with two-way heads samples an image diagonal by diagonal, by sampler 'diagonal'; in raster order there is "
    "the model that it was made of."
)


class TwoWaySession(LlamaGenSession):
    """Decode by diagonals; `lengths` count the tokens of those that are complete. Rows are at diagonals of their own.

    Inputs are in the cache at their positions in raster order, the branch's too. What a short diagonal has after its
    last cell is fed at a slot past the end, to which nothing attends.
    """

    model: TwoWayLlamaGen  # type: ignore[assignment]

    def __init__(self, model: TwoWayLlamaGen, *condition: Tensor, grid: int | None = None, **settings: Any):
        layout = Layout(side := grid or model.config.grid, side)
        self.diagonals = Diagonals.of(layout, model.device)
        when = model.when(side)
        self.when = torch.cat([when, when.new_full((1,), 2 * side)])  # and of the slot past the end
        settings["window"] = max(settings["window"], 2, width_of(layout))
        super().__init__(model, *condition, grid=grid, **settings)
        self.first = torch.full_like(self.diagonals.cells[0], self.prefix + self.length)
        self.first[0] = self.prefix - 1  # the inputs of the corner's pass: the condition's last slot

    def forward(self, tokens: Tensor, tree: Tree | None = None, first: int = 0) -> Tensor:
        raise VisarError(RASTER)

    def forward_at(self, tokens: Tensor, positions: Tensor, written: Tensor) -> Tensor:
        raise VisarError(RASTER)

    def mask(self, last: Tensor) -> Tensor:
        """The mask [rows, 1, slots], bool, of inputs that are there with the diagonals `last` [B], -1 the condition."""
        last = last.repeat(self.batches)[:, None]
        own = (self._slot[: len(self.when)] == self.prefix - 1) & (last < 0)  # of a caption without a word, too
        there = (self.when <= last) & self.valid[:, : len(self.when)] | own
        return there[:, None, self.folded :]

    def forward_diagonal(self, tokens: Tensor) -> Tensor:
        d, table = self.diagonals.of_length[self.lengths], self.diagonals
        x = self.model.tok_embeddings(tokens).repeat(self.batches, 1, 1)
        slots = table.cells[(d - 1).clamp_min(0)] + self.prefix
        slots = torch.where(d[:, None] == 0, self.first, slots).repeat(self.batches, 1)
        x = torch.where((slots == self.prefix - 1)[..., None], self.condition[:, -1:], x)
        mask = self._biased(self.mask(d - 1).expand(-1, tokens.shape[1], -1))
        visible = len(self.when)
        self.counted(slots, visible, by_host=True)
        attend = self.cache.attend(slots - self.folded, mask, visible - self.folded)
        hidden = self._run(x, slots, slots, attend)
        at = Neighbours(*(part[d].repeat(self.batches, 1) for part in table.neighbours))
        self._logits = self.model.predicted(hidden, at)
        return self.guided(self._logits, self._guided_as(d))

    def _guided_as(self, d: Tensor) -> Tensor:
        """The positions [B, W] by which guidance ends: as released, a diagonal is guided while at most the interval's
        number of tokens came before it."""
        before = self.lengths + (d > 0).long()
        return before[:, None].expand(-1, self.diagonals.cells.shape[1])
