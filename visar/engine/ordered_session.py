"""The Session over a decoder that samples the cells of an image in any order that is fixed before the first pass."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from visar.engine.decoder_session import DecoderSession
from visar.engine.session import Session
from visar.engine.tree import Tree
from visar.errors import VisarError
from visar.kernels.attention import AttentionMetadata


class OrderedSession(DecoderSession):
    """Decode the cells `cells` [B, N] of each image in turn; a subclass sets them when it embeds its conditions.

    Each input of a pass is two of the model: the token before, at the rotary row of its own cell, and a query that says
    which cell is next (`queries`), at the row of that one. The query gives the logits. Both stay in the cache, where
    token n is at slot prefix + 2 n + 1, after its query. So windows, rejected drafts and rows at their own pace are as
    in raster order, and a pass of W tokens computes 2 W.
    """

    row_tensors: ClassVar[tuple[str, ...]] = (*DecoderSession.row_tensors, "_cells")
    per_token = 2
    asked_again: ClassVar[bool] = True  # the queries of a group that was sampled, now each after the token before it
    keep = Session.keep  # no trees

    def __init__(self, model: Any, batch: int, *settings: Any, **named: Any):
        super().__init__(model, batch, *settings, **named)
        self._cells = torch.arange(self.length, device=self.device).repeat(len(self.condition), 1)

    @property
    def cells(self) -> Tensor:  # type: ignore[override]
        return self._cells[: self.batch]

    def arrange(self, cells: Tensor) -> None:
        """Set the order of images that start: `cells` [B, N], of each a permutation of all."""
        self._cells.copy_(cells.repeat(self.batches, 1))

    @abstractmethod
    def queries(self, slots: Tensor) -> Tensor:
        """Embeddings [..., dim] of the queries at `slots` [...]."""

    def placed(self, x: Tensor, slots: Tensor) -> Tensor:
        """Embeddings x [rows, W, dim] of the tokens at `slots` [rows, W], for models with positions learnt."""
        return x

    def mask(self, slots: Tensor, first: int, visible: int) -> AttentionMetadata | Tensor:
        """What inputs at `slots` [rows, 2 W] attend to, as `KVCache.attend` takes it: all before, and themselves."""
        root = (self.root_slots() - self.folded).repeat(self.batches)
        return AttentionMetadata(root, self.per_token * first, None, self.bias)

    def root_slots(self) -> Tensor:
        return self.per_token * self.lengths + self.prefix - 1

    def positions_of(self, slots: Tensor) -> Tensor:
        """The positions of inputs at `slots` [rows, W]: cell n has prefix + n; past the end they are the last's."""
        at = ((slots - self.prefix) // self.per_token).clamp(0, self.length - 1)
        return torch.where(slots < self.prefix, slots, self._cells.gather(1, at) + self.prefix)

    def rotary_rows(self, slots: Tensor) -> Tensor:
        return self.table[self.positions_of(slots)]

    def forward(self, tokens: Tensor, tree: Tree | None = None, first: int = 0) -> Tensor:
        if tree is not None:
            raise VisarError("A model that samples in any order has no trees; use a sampler that drafts sequences.")
        count = tokens.shape[1]
        x = self.model.tok_embeddings(tokens).repeat(self.batches, 1, 1)
        if first == 0:
            fresh = (self.lengths == 0).repeat(self.batches)[:, None]
            x[:, 0] = torch.where(fresh, self.condition[:, -1], x[:, 0])
        fed, root = self.per_token * torch.arange(first, first + count, device=self.device), self.root_slots()
        at = (root[:, None] + fed).repeat(self.batches, 1)  # of the tokens; each query is at the slot after
        x = torch.stack([self.placed(x, at), self.queries(at + 1).to(x.dtype)], dim=2).flatten(1, 2)
        slots, visible = torch.stack([at, at + 1], dim=2).flatten(1, 2), self.visible(self.per_token * (first + count))
        mask = self.mask(slots, first, visible)
        self.counted(slots, visible, by_host=isinstance(mask, Tensor))
        attend = self.cache.attend(slots - self.folded, mask, visible - self.folded)
        self._logits = self.model.logits(self._run(x, slots, slots, attend)[:, 1::2])
        return self.guided(self._logits, self.follows(count, None, first))

    def forward_group(self, tokens: Tensor, before: Tensor, count: Tensor) -> Tensor:
        step, root = self.per_token * torch.arange(tokens.shape[1], device=self.device), self.root_slots()[:, None]
        beyond = len(self._slot) - 1  # where nothing is that is read
        fed = root + step - self.per_token * (before[:, None] - 1)
        fed = torch.where(fed <= root, fed, beyond)
        again = torch.where(fed < root, fed + 1, beyond)[:, : self.asked_again * tokens.shape[1]]
        asked = torch.where(step < self.per_token * count[:, None], root + 1 + step, beyond)
        fed, again, asked, root = (s.repeat(self.batches, 1) for s in (fed, again, asked, root))
        x = self.model.tok_embeddings(tokens).repeat(self.batches, 1, 1)
        x = torch.where((fed == self.prefix - 1)[..., None], self.condition[:, -1:], x)
        queries = self.queries(torch.cat([again, asked], dim=1))
        x = torch.cat([self.placed(x, fed), queries.to(x.dtype)], dim=1)
        slots, visible = torch.cat([fed, again, asked], dim=1), self.visible(self.per_token * tokens.shape[1])
        mask = self.group_mask(slots, root, count.repeat(self.batches)[:, None], visible)
        self.counted(slots, visible, by_host=True)
        attend = self.cache.attend(slots - self.folded, self._biased(mask[..., self.folded :]), visible - self.folded)
        self._logits = self.model.logits(self._run(x, slots, slots, attend)[:, -tokens.shape[1] :])
        return self.guided(self._logits, self.group_positions(tokens.shape[1]))

    def group_mask(self, slots: Tensor, root: Tensor, count: Tensor, visible: int) -> Tensor:
        """The mask [rows, inputs, visible], bool, of a pass over a group: tokens and queries at `slots` [rows, inputs].

        `root` [rows, 1] are the slots of the last tokens, behind which come the queries of the next `count` [rows, 1].
        As in RandAR, an input sees all before it, a query the group's queries before it too.
        """
        slot, root = self._slot[:visible], root[..., None]
        there = (slot <= root) | ((slot - root) % self.per_token == 1)
        return (slot <= slots[..., None]) & there & self.valid[:, None, :visible] | (slot == slots[..., None])

    def group_positions(self, window: int) -> Tensor:
        """The positions [B, window] by which a group is guided; in RandAR that of its first cell."""
        return self.lengths[:, None].expand(-1, window)

    def forward_at(self, tokens: Tensor, positions: Tensor, written: Tensor) -> Tensor:
        raise VisarError("A model that samples in any order has no rows side by side; use a sampler of sequences.")

    def guided(self, logits: Tensor, positions: Tensor) -> Tensor:
        """As in any session; where guidance grows, its scale at position n is 1 + (scale - 1) n / N, as in RandAR."""
        if self.batches == 1 or self.guidance.grows is False:
            return super().guided(logits, positions)
        (cond, uncond), share = logits.chunk(2), positions / self.length
        if isinstance(grows := self.guidance.grows, Tensor):
            share = torch.where(grows[:, None], share, 1.0)
        # u' with u' + s (c - u') = c + (s - 1) (n / N) (c - u)
        return self.guidance.combine(cond, torch.lerp(cond, uncond, share[..., None]), positions)
