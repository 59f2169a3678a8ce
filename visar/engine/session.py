"""The Session: the only thing a sampler talks to. It hides the model, its cache, guidance and the rows' progress."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from visar.engine.tree import Tree
from visar.errors import VisarError

if TYPE_CHECKING:
    from visar.engine.drafter import Drafter


def require_finite(values: Tensor, what: str, dtype: torch.dtype) -> None:
    """Raise `VisarError` for values that overflowed in `dtype`."""
    if not bool(torch.isfinite(values).all()):
        name = str(dtype).removeprefix("torch.")
        raise VisarError(f"{what} are not finite in {name}; load the model in bfloat16 or float32.")


class Session(ABC):
    """A batch of B sequences of `length` tokens, of which row b has committed `lengths[b]`.

    A subclass gives `forward`. Rows progress independently, a rejected draft costs nothing to undo (the pointer simply
    does not move), and every shape is fixed by B and W.
    """

    def __init__(self, batch: int, length: int, vocab: int, device: torch.device | str = "cpu"):
        self.batch, self.length, self.vocab = batch, length, vocab
        self.device = torch.device(device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=self.device)
        self.drafter: Drafter | None = None  # for samplers that draft with a model of their own
        self.prefill_passes = 0  # passes before the first that predicts
        self.watched = False  # whether `reached` may have something to do
        self.codebook: Tensor | None = None  # [V, D], for samplers that ask which tokens look alike

    def positions(self, window: int) -> Tensor:
        """The positions [B, W] that a pass of W tokens predicts: those after the committed prefix.

        Near the end they run past `length`; what is predicted there is never committed.
        """
        return self.lengths[:, None] + torch.arange(window, device=self.device)

    def follows(self, count: int, tree: Tree | None = None, first: int = 0) -> Tensor:
        """The positions [B, count] that a pass over the nodes `first`.. of a tree predicts, each behind its node."""
        if tree is None:
            return self.positions(first + count)[:, first:]
        return self.lengths[:, None] + tree.depths[:, first : first + count]

    @abstractmethod
    def forward(self, tokens: Tensor, tree: Tree | None = None, first: int = 0) -> Tensor:
        """One pass: guided logits [B, W, V], fp32, of the positions that follow the committed prefix.

        `tokens` [B, W] are the last committed token, then W - 1 drafts. While nothing is committed the first one is
        ignored: the condition stands in its place. With a `tree` they are its nodes, and each sees those above it
        only. With `first` > 0 they are the nodes from there on, those before being in the cache from passes that
        nothing was committed since.
        """

    def forward_at(self, tokens: Tensor, places: Tensor, written: Tensor) -> Tensor:
        """A pass that follows no order: guided logits [B, W, V], fp32, of the positions `places` [W].

        The input of place n is token n - 1, `tokens` [B, W], and of place 0 the condition. Each sees itself and those
        before it, as far as they are `written` [length]: fed in this pass or one before.
        """
        raise VisarError(f"{type(self).__name__} decodes in raster order alone.")

    def keep(self, path: Tensor) -> None:
        """Before a commit: the nodes `path` [B, D] of a tree, -1 behind its end, become the first D behind the root."""
        raise VisarError(f"{type(self).__name__} has no trees; use a sampler that drafts chains.")

    def start(self, *condition: Tensor) -> None:
        """Begin other images, of conditions of the same shape, in the same buffers."""
        raise VisarError(f"{type(self).__name__} cannot be started again.")

    def drop_unconditional(self) -> None:  # noqa: B027 (a session may have one half only)
        """Leave the unconditional half of the batch: no token from here on is guided."""

    def reached(self, least: int) -> bool:
        """Told now and then that every row has `least` tokens; whether the shapes of passes are others from now on."""
        return False

    def check(self) -> None:  # noqa: B027 (a session without a model has nothing to check)
        """Raise `VisarError` if what the last pass gave is no law at all; called once, when all rows are done."""

    def commit(self, count: Tensor) -> None:
        """Row b keeps the next `count[b]` tokens; counts that pass the end are an error of the sampler."""
        self.lengths += count
