"""The Session: the only thing a sampler talks to. It owns the model, its cache, guidance and the rows' progress."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from visar.engine.layout import Layout
from visar.engine.tree import Tree
from visar.errors import VisarError
from visar.params import from_one

if TYPE_CHECKING:
    from visar.engine.drafter import Drafter


class RowsAreFixed(VisarError):
    """A session whose rows cannot be replaced one by one."""


class Session(ABC):
    """A batch of B sequences of `length` tokens, of which row b has committed `lengths[b]`.

    A subclass gives `forward`. Rows progress independently, a rejected draft is undone by not moving the row's length,
    and every shape is fixed by B and W. Position n of row b is the cell `cells[b, n]` of the image, in the order of
    the layout; without `cells` it is cell n. Tokens, noise and guidance go by positions, what is forced by cells.
    """

    cells: Tensor | None = None  # [B, N]
    hidden: Tensor | None = None  # [rows, W, dim], what gave the last logits, of sessions that know it

    def __init__(self, batch: int, length: int, vocab: int, device: torch.device | str = "cpu"):
        self.batch, self.length, self.vocab = (
            from_one(name, value) for name, value in (("batch", batch), ("length", length), ("vocab", vocab))
        )
        self.device = torch.device(device)
        self.lengths = torch.zeros(self.batch, dtype=torch.long, device=self.device)
        self.window = 1  # the most inputs of a pass that there is room for at the end of an image, as far as is known
        self.drafter: Drafter | None = None  # for samplers that need one
        self.prefill_passes = 0  # passes before the first that predicts
        self.watched = False  # whether the loop should call `reached`
        self.codebook: Tensor | None = None  # [V, D], for samplers that compare tokens
        self.layout: Layout | None = None  # rows and columns of the image, for samplers that use them

    def positions(self, window: int) -> Tensor:
        """The positions [B, W] that a pass of W tokens predicts: those after the committed prefix.

        Near the end some are past `length`; these are never committed.
        """
        return self.lengths[:, None] + torch.arange(window, device=self.device)

    def in_raster(self, values: Tensor, rows: slice = slice(None)) -> Tensor:
        """Values [B, N] of the positions of some rows in the order of the layout; in raster order the very tensor."""
        return values if self.cells is None else torch.empty_like(values).scatter_(1, self.cells[rows], values)

    def follows(self, count: int, tree: Tree | None = None, first: int = 0) -> Tensor:
        """The positions [B, count] that a pass over the nodes `first`.. of a tree predicts, each after its node."""
        if tree is None:
            return self.positions(first + count)[:, first:]
        return self.lengths[:, None] + tree.depths[:, first : first + count]

    @abstractmethod
    def forward(self, tokens: Tensor, tree: Tree | None = None, first: int = 0) -> Tensor:
        """One pass: guided logits [B, W, V], fp32, of the positions that follow the committed prefix.

        `tokens` [B, W] are the last committed token, then W - 1 drafts. While nothing is committed, the condition
        replaces the first. With a `tree` they are its nodes, and each attends only to its ancestors among them. With
        `first` > 0 they are the nodes from `first` on; earlier passes since the last commit have cached the others.
        In a drafter's session `lengths` may then be -1: node 1 is the condition, and there is no node 0.
        """

    def forward_at(self, tokens: Tensor, positions: Tensor, written: Tensor) -> Tensor:
        """A pass in any order: guided logits [B, W, V], fp32, of the `positions` [W].

        The input of position n is token n - 1, of `tokens` [B, W]; of position 0 it is the condition. Each attends to
        itself and to earlier positions that are `written` [length]: inputs of this pass or one before. Raises
        `VisarError` if the session supports raster order only.
        """
        raise VisarError(f"{type(self).__name__} decodes in raster order only.")

    def forward_diagonal(self, tokens: Tensor) -> Tensor:
        """A pass over a diagonal: guided logits [B, W, V], fp32, of the cells of each row's next one, top to bottom.

        `tokens` [B, W] are those of the diagonal before (`visar.engine.diagonals`); the corner's is the condition. What
        a diagonal with fewer cells has after its last one means nothing. Raises `VisarError` if the model samples in
        raster order.
        """
        raise VisarError(
            f"{type(self).__name__} has no two-way heads: sampler 'diagonal' is for models that were trained for it."
        )

    def forward_group(self, tokens: Tensor, before: Tensor, count: Tensor) -> Tensor:
        """A pass over a group of cells: guided logits [B, W, V], fp32, of the next `count` [B] positions of each row.

        `tokens` [B, W] begin with those of the last `before` [B] positions, the group before; before the first group
        that is the condition, one input. What comes after a group's last cell means nothing. Raises `VisarError` if the
        model was not trained for it.
        """
        raise VisarError(f"{type(self).__name__} has no groups: sampler 'parallel' is for RandAR and LPD.")

    def keep(self, path: Tensor) -> None:
        """Before a commit: the nodes `path` [B, D] of a tree, -1 after its end, become the first D after the root."""
        raise VisarError(f"{type(self).__name__} has no trees; use a sampler that drafts sequences.")

    def start(self, *condition: Tensor) -> None:
        """Start new images in the same buffers, for conditions of the same shapes."""
        raise VisarError(f"{type(self).__name__} cannot be started again.")

    def place(self, row: int, fresh: Session) -> None:
        """Start a new image in one `row`: that of `fresh`, a session of one row that has just started.

        Nothing of what was in the row stays, and no other row changes. Raises `RowsAreFixed` where they cannot be.
        """
        raise RowsAreFixed(f"Rows of a {type(self).__name__} cannot be replaced; decode in batches.")

    def select(self, rows: Tensor) -> None:
        """Row i becomes what the row `rows[i]` was; there are `len(rows)` from then on, at most as many as at first.

        The drafter does so before, as it asks the session where its rows are. Raises as `place`.
        """
        raise RowsAreFixed(f"Rows of a {type(self).__name__} cannot be replaced; decode in batches.")

    def finite_rows(self) -> Tensor:
        """Which rows [B] the last pass gave a distribution for."""
        return torch.ones(self.batch, dtype=torch.bool, device=self.device)

    def drop_unconditional(self) -> None:  # noqa: B027 (a session may have one batch only)
        """Drop the unconditional batch: no token from here on is guided."""

    def reached(self, least: int) -> bool:
        """Called when every row has `least` tokens; returns whether the shapes of passes change."""
        return False

    def check(self) -> None:  # noqa: B027 (a session without a model has nothing to check)
        """Raise `VisarError` if the arithmetic of a pass overflowed; called once, when all rows are done.

        Whether every distribution that was sampled is one, the target checks (`visar.samplers.Target`).
        """

    def commit(self, count: Tensor) -> None:
        """Row b commits its next `count[b]` tokens, at most those up to `length`."""
        self.lengths += count
