"""A model small enough to enumerate that says p(cell | any other cells), and a session over it in any order.

Its conditionals are those of one joint distribution, so that every order gives the same images: whatever a sampler does
with orders, it is exact for this model or it is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from visar.engine.layout import Layout
from visar.engine.session import Session
from visar.eval.exactness.tabular import Settings


@dataclass(frozen=True)
class AnyOrderModel:
    """`probabilities` [V**N], float64, of all images, in the order of their values base V in raster order."""

    layout: Layout
    vocab: int
    probabilities: Tensor

    @staticmethod
    def of(layout: Layout, vocab: int, seed: int = 7, spread: float = 1.0) -> AnyOrderModel:
        """Independent normal logits for every image."""
        logits = torch.randn(vocab**layout.length, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
        return AnyOrderModel(layout, vocab, (logits * spread).softmax(0))

    def joint(self, settings: Settings) -> np.ndarray:
        """The probabilities, of settings that change nothing: with others the order would matter."""
        assert settings == Settings()
        return self.probabilities.numpy()


class AnyOrderSession(Session):
    """Decode an `AnyOrderModel`; `cells` may change between passes, but for the positions that are committed."""

    cells: Tensor

    def __init__(self, model: AnyOrderModel, batch: int, window: int):
        length = model.layout.length
        super().__init__(batch, length, model.vocab)
        self.model, self.window, self.layout = model, window, model.layout
        self.cells = torch.arange(length).repeat(batch, 1)
        self.fed = torch.zeros(batch, length + window, dtype=torch.long)  # at n + 1 the token of position n
        self.images = torch.cartesian_prod(*[torch.arange(model.vocab)] * length).T  # [N, V**N]

    def forward(self, tokens: Tensor, tree: object = None, first: int = 0) -> Tensor:
        assert tree is None and first == 0
        self.fed.scatter_(1, self.positions(tokens.shape[1]), tokens)
        left = self.model.probabilities.expand(self.batch, -1)  # of the images with the tokens so far
        for n in range(self.length):
            left = torch.where((n < self.lengths)[:, None], self._with(left, torch.full_like(self.lengths, n)), left)
        logits = []
        for j in range(tokens.shape[1]):
            at = (self.lengths + j).clamp_max(self.length - 1)
            if j:
                left = self._with(left, (at - 1).clamp_min(0))
            here = self.images[self.cells.gather(1, at[:, None])[:, 0]]
            mass = torch.zeros(self.batch, self.vocab, dtype=torch.double).scatter_add(1, here, left)
            logits.append(mass.log().nan_to_num(neginf=0.0))  # there is no image left past the end
        return torch.stack(logits, 1).float()

    def _with(self, left: Tensor, n: Tensor) -> Tensor:
        """What is left [B, V**N] of the images that have the token of position n [B]."""
        own = self.images[self.cells.gather(1, n[:, None])[:, 0]]
        return left * (own == self.fed.gather(1, n[:, None] + 1))
