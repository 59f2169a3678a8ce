"""The Session over a LlamaGen-like transformer: static KV cache, both guidance halves in one pass, ragged rows."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from visar.engine.guidance import Guidance
from visar.engine.kv_cache import KVCache
from visar.engine.session import Session, require_finite
from visar.engine.tree import Tree
from visar.models.llamagen import LlamaGen


class ModelSession(Session):
    """Decode `length` tokens for a batch of conditions.

    `condition`: class ids [B] or caption features [B, T, C] with `condition_mask` [B, T]. With guidance the model runs
    on 2B rows, conditional half first; both halves see the same drafts and the same caption mask. The cache has room
    for `window` - 1 tokens past the end, so the last window needs no special shape. Where `taps` are given the
    features that the output head reads are kept for a drafter, and with them the outputs of those layers: `features`
    [rows, 1 + slots, dim * (1 + taps)], one slot late.
    """

    def __init__(
        self,
        model: LlamaGen,
        condition: Tensor,
        condition_mask: Tensor | None = None,
        *,
        length: int,
        window: int,
        grid: int | None = None,
        guidance: Guidance = Guidance(),
        taps: Collection[int] | None = None,
    ):
        super().__init__(len(condition), length, model.config.vocab_size, model.device)
        self.model, self.guidance = model, guidance
        self.halves = 2 if guidance.active else 1
        self.prefix = model.config.condition_length
        self.table = model.rotary(grid)
        rows, slots = self.batch * self.halves, self.prefix + length + window - 1
        c = model.config
        self.cache = KVCache(c.num_layers, rows, slots, c.num_heads, model.head_dim, model.dtype, self.device)
        self.taps = taps or ()
        shape = (rows, 1 + slots, c.dim * (1 + len(self.taps)))
        self.features = None if taps is None else torch.zeros(shape, dtype=model.dtype, device=self.device)
        self.prefill_passes = 0
        valid = torch.ones(self.batch, slots, dtype=torch.bool, device=self.device)
        if condition_mask is not None:
            valid[:, : self.prefix] = condition_mask.to(self.device)
        self.valid = valid.repeat(self.halves, 1)
        self._slot = torch.arange(slots, device=self.device)
        self.bytes_read = 0
        self._prefill(condition.to(self.device))

    @torch.inference_mode()
    def _prefill(self, condition: Tensor) -> None:
        """Embed the condition and run all its slots but the last, which is the first pass's root."""
        embed = self.model.cls_embedding
        parts = [embed(condition)] + ([embed(embed.null_like(condition))] if self.halves == 2 else [])
        self.condition = torch.cat(parts)  # [rows, prefix, dim]
        if self.prefix > 1:
            slots = self._slot[: self.prefix - 1].expand(len(self.condition), -1)
            self._pass(self.condition[:, :-1], slots, slots, self.sees(slots, self.prefix - 1))
            self.prefill_passes = 1
            self.bytes_read = 0  # what is timed begins behind the prefill

    def root_slots(self) -> Tensor:
        """The cache slots [B] of the last committed tokens, which the next pass is fed first."""
        return self.lengths + self.prefix - 1

    def embedded(self, tokens: Tensor, slots: Tensor) -> Tensor:
        """Embeddings [rows, W, dim] at `slots` [B, W], of committed `tokens` [B, N] or of the condition's last slot."""
        x = self.model.tok_embeddings(tokens.gather(1, (slots - self.prefix).clamp_min(0))).repeat(self.halves, 1, 1)
        first = (slots == self.prefix - 1).repeat(self.halves, 1)[..., None]
        return torch.where(first, self.condition[:, -1:], x)

    def sees(self, slots: Tensor, visible: int, tree: Tree | None = None, first: int = 0) -> Tensor:
        """What inputs at `slots` [rows, W] see of the first `visible` slots, [rows, W, visible].

        That is what lies before them and is no padding, and themselves; behind the root, of a tree that they are the
        nodes `first`.. of, only what is above them.
        """
        slot = self._slot[:visible]
        mask = (slot <= slots[..., None]) & self.valid[:, None, :visible] | (slot == slots[..., None])
        if tree is not None:
            nodes = slot - self.root_slots()[:, None]
            mask &= (tree.sees(first, slots.shape[1], nodes) | (nodes < 0)[:, None]).repeat(self.halves, 1, 1)
        return mask

    def visible(self, count: int) -> int:
        """The slots that a pass over `count` inputs reads. Asking a GPU for the lengths would make it wait, so all."""
        if self.device.type != "cpu":
            return self.cache.keys.shape[2]
        return self.prefix - 1 + int(self.lengths.max()) + count

    def turned(self, slots: Tensor) -> Tensor:
        """The rows of the position table for slots [rows, W]; those past the end are clamped."""
        return self.table[slots.clamp_max(len(self.table) - 1)]

    def guided(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, W, V] of both halves together, for logits [rows, W, V] of the positions [B, W]."""
        if self.halves == 1:
            return logits
        cond, uncond = logits.chunk(2)
        return self.guidance.combine(cond, uncond, positions)

    def _pass(self, x: Tensor, slots: Tensor, at: Tensor, mask: Tensor) -> Tensor:
        """Run embeddings x [rows, W, dim], written at `slots` and turned to the slots `at`, both [rows, W]."""
        self.bytes_read += len(x) * mask.shape[-1] * self.cache.bytes_per_slot
        h = self.model.run(x, self.turned(at), self.cache.attend(slots, mask), self.taps)
        if self.features is not None:
            self.features[self.cache.rows, slots + 1] = h
        return self.model.logits(h)

    def forward(self, tokens: Tensor, tree: Tree | None = None, first: int = 0) -> Tensor:
        count = tokens.shape[1]
        x = self.model.tok_embeddings(tokens).repeat(self.halves, 1, 1)
        if first == 0:
            fresh = (self.lengths == 0).repeat(self.halves)[:, None]
            x[:, 0] = torch.where(fresh, self.condition[:, -1], x[:, 0])
        positions = self.follows(count, tree, first)
        slots = (self.follows(count, None, first) + self.prefix - 1).repeat(self.halves, 1)
        at = slots if tree is None else (positions + self.prefix - 1).repeat(self.halves, 1)
        self._logits = self._pass(x, slots, at, self.sees(slots, self.visible(first + count), tree, first))
        return self.guided(self._logits, positions)

    def forward_at(self, tokens: Tensor, places: Tensor, written: Tensor) -> Tensor:
        x = self.model.tok_embeddings(tokens).repeat(self.halves, 1, 1)
        x = torch.where((places == 0)[None, :, None], self.condition[:, -1:], x)
        slots = (places + self.prefix - 1).expand(len(x), -1)
        there = torch.ones_like(self._slot, dtype=torch.bool)
        there[self.prefix - 1 :] = False
        there[self.prefix - 1 : self.prefix - 1 + len(written)] = written
        visible = self.prefix - 1 + len(written)
        mask = self.sees(slots, visible) & there[:visible]
        self._logits = self._pass(x, slots, slots, mask)
        return self.guided(self._logits, places.expand(self.batch, -1))

    def keep(self, path: Tensor) -> None:
        root = self.root_slots()[:, None]
        to = root + torch.arange(1, path.shape[1] + 1, device=self.device)
        source = torch.where(path > 0, root + path, to).repeat(self.halves, 1)
        to = to.repeat(self.halves, 1)
        self.cache.move(source, to)
        if self.features is not None:
            self.features[self.cache.rows, to + 1] = self.features[self.cache.rows, source + 1]

    def check(self) -> None:
        # What is not finite stays in the cache, so the last pass shows what happened in any before it.
        require_finite(self._logits, "The model's logits", self.model.dtype)
