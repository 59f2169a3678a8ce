"""The Session: the only thing a sampler talks to. It hides the model, its cache, guidance and the rows' progress."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Session(ABC):
    """A batch of B sequences of `length` tokens, of which row b has committed `lengths[b]`.

    A subclass gives `forward`. Rows progress independently, a rejected draft costs nothing to undo (the pointer simply
    does not move), and every shape is fixed by B and W.
    """

    def __init__(self, batch: int, length: int, vocab: int, device: torch.device | str = "cpu"):
        self.batch, self.length, self.vocab = batch, length, vocab
        self.device = torch.device(device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=self.device)

    def positions(self, window: int) -> Tensor:
        """The positions [B, W] that a pass of W tokens predicts: those after the committed prefix.

        Near the end they run past `length`; what is predicted there is never committed.
        """
        return self.lengths[:, None] + torch.arange(window, device=self.device)

    @abstractmethod
    def forward(self, tokens: Tensor) -> Tensor:
        """One pass: guided logits [B, W, V], fp32, of the positions that follow the committed prefix.

        `tokens` [B, W] are the last committed token, then W - 1 drafts. While nothing is committed the first one is
        ignored: the condition stands in its place.
        """

    def check(self) -> None:  # noqa: B027 (a session without a model has nothing to check)
        """Raise `VisarError` if what the last pass gave is no law at all; called once, when all rows are done."""

    def commit(self, count: Tensor) -> None:
        """Row b keeps the next `count[b]` tokens; counts that pass the end are an error of the sampler."""
        self.lengths += count
