"""What a drafter that reads hidden states asks of the session of its target."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from visar.engine.cached_session import CachedSession
from visar.engine.tree import Tree


class FeatureSession(CachedSession):
    """A session that may store `features` for a drafter, [rows, 1 + slots, dim * (1 + aux_layers)], one slot late.

    They are the hidden states that the output head reads, and after them the outputs of the layers `aux_layers`. The
    `condition` [rows, T, dim] are the embeddings before the first token; rows may have fewer of them, the first ones.
    """

    features: Tensor | None = None
    condition: Tensor

    @abstractmethod
    def first_slots(self) -> Tensor:
        """The slots [rows, 1] of the last inputs of the conditions, which are the roots of the first pass."""

    @abstractmethod
    def last_inputs(self) -> Tensor:
        """The embeddings [rows, dim] there."""

    @abstractmethod
    def token_embeddings(self, tokens: Tensor) -> Tensor:
        """Embeddings [B, W, dim] of tokens [B, W]."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, W, V], fp32, of hidden states; auxiliary ones after them are ignored."""

    @property
    @abstractmethod
    def head_bytes(self) -> int:
        """Bytes of weights that `logits` reads."""

    @abstractmethod
    def rotary_rows(self, slots: Tensor) -> Tensor:
        """The rows [rows, W, head_dim / 2, 2] of the rotary table for slots [rows, W]."""

    @abstractmethod
    def attention_mask(self, slots: Tensor, visible: int, tree: Tree | None = None, first: int = 0) -> Tensor:
        """The mask [rows, W, visible], bool, of inputs at `slots` [rows, W] over the first `visible` slots.

        An input attends to itself and to earlier slots that are no padding. With a `tree`, of which the inputs are the
        nodes `first`.., it attends after the root to its ancestors only.
        """

    def embedded(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The inputs [rows, W, dim] of `positions` [B, W], of committed `tokens` [B, N] or of the condition's end."""
        x = self.token_embeddings(tokens.gather(1, (positions - 1).clamp_min(0))).repeat(self.batches, 1, 1)
        return torch.where((positions == 0).repeat(self.batches, 1)[..., None], self.last_inputs()[:, None], x)

    def store(self, hidden: Tensor, slots: Tensor) -> None:
        """Store the hidden states [rows, W, ...] of inputs at `slots` [rows, W], if anybody reads them."""
        if self.features is not None:
            self.features[self.cache.rows, slots + 1] = hidden

    def move_features(self, source: Tensor, to: Tensor) -> None:
        """Copy those of the slots `source` [rows, D] to the slots `to`."""
        if self.features is not None:
            self.features[self.cache.rows, to + 1] = self.features[self.cache.rows, source + 1]
