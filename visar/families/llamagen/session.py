"""The Session over a LlamaGen-like transformer: static KV cache, both guidance halves in one pass, ragged rows."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from visar.engine.decoder import Attend
from visar.engine.guidance import Guidance
from visar.engine.kv_cache import KVCache
from visar.engine.session import Session, require_finite
from visar.engine.tree import Tree
from visar.families.llamagen.gpt import LlamaGen
from visar.kernels.attention import AttentionMetadata


class ModelSession(Session):
    """Decode `length` tokens for a batch of conditions.

    `condition`: class ids [B] or caption features [B, T, C] with `condition_mask` [B, T]. With guidance the model runs
    on 2B rows, conditional half first; both halves see the same drafts and the same caption mask. The cache has room
    for `window` - 1 tokens past the end, so the last window needs no special shape. Where `aux_layers` are given the
    features that the output head reads are kept for a drafter, and with them the outputs of those layers: `features`
    [rows, 1 + slots, dim * (1 + aux_layers)], one slot late.
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
        aux_layers: Collection[int] | None = None,
    ):
        super().__init__(len(condition), length, model.config.vocab_size, model.device)
        self.model, self.guidance = model, guidance
        self.halves = 2 if guidance.active else 1
        self.watched = guidance.active and guidance.interval >= 0
        self.prefix = model.config.condition_length
        self.table = model.rotary(grid)
        rows, slots = self.batch * self.halves, self.prefix + length + window - 1
        c = model.config
        # The condition slots before the last are one slot of the cache, see `_prefill`: so many fewer there are.
        self.folded = max(self.prefix - 2, 0)
        head_dim, device = model.head_dim, self.device
        self.cache = KVCache(c.num_layers, rows, slots - self.folded, c.num_heads, head_dim, model.dtype, device)
        self.aux_layers = aux_layers or ()
        shape = (rows, 1 + slots, c.dim * (1 + len(self.aux_layers)))
        self.features = None if aux_layers is None else torch.zeros(shape, dtype=model.dtype, device=device)
        self.condition = torch.zeros(rows, self.prefix, c.dim, dtype=model.dtype, device=device)
        self.valid = torch.ones(rows, slots, dtype=torch.bool, device=device)
        self.bias = torch.zeros(rows, device=device) if self.prefix > 1 else None
        self.prefill_passes = 1 if self.prefix > 1 else 0
        self._slot = torch.arange(slots, device=device)
        self.start(condition, condition_mask)

    @torch.inference_mode()
    def start(self, condition: Tensor, condition_mask: Tensor | None = None) -> None:
        """Begin images of these conditions, of the same shapes as before, in the same buffers."""
        condition, embed = condition.to(self.device), self.model.cls_embedding
        self.lengths.zero_()
        parts = [embed(condition)] + ([embed(embed.null_like(condition))] if self.halves == 2 else [])
        self.condition.copy_(torch.cat(parts))
        if condition_mask is not None:
            self.valid[:, : self.prefix] = condition_mask.to(self.device).repeat(self.halves, 1)
        if self.prefix > 1:
            self._prefill()
        self.bytes_read = 0  # what is timed begins behind the prefill

    def _prefill(self) -> None:
        """Run all condition slots but the last, which is the first pass's root, and fold them into one.

        Their rotary rows are zero, and so are their queries and keys: each attends to all valid slots up to its own
        alike, and whatever follows sees n keys of logit 0. Those are one key of logit log n whose value is their mean.
        """
        before = self.prefix - 1
        at = self._slot[:before].expand(len(self.condition), -1)
        sees = self.sees(at, before).float()
        share = sees / sees.sum(-1, keepdim=True)
        valid = self.valid[:, :before].float()
        count = valid.sum(-1, keepdim=True)
        assert self.bias is not None
        self.bias.copy_(count[:, 0].log())  # -inf where there is none
        mean = valid / count.clamp_min(1)

        def attend(layer: int, qkv: Tensor, _: Tensor) -> Tensor:
            v = qkv[:, :, 2 * self.model.config.num_heads :].float()
            self.cache.values[layer, :, 0] = torch.einsum("rs,rshd->rhd", mean, v).to(self.cache.values.dtype)
            return torch.einsum("rqs,rshd->rqhd", share, v).to(qkv.dtype)

        self._run(self.condition[:, :-1], at, at, attend)

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
        """The slots up to the last of `count` inputs. Asking a GPU for the lengths would make it wait, so all."""
        if self.device.type != "cpu":
            return len(self._slot)
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

    def narrow(self) -> None:
        """Leave the unconditional half, which is of no use once guidance is over in all rows."""
        if self.halves == 1:
            return
        self.halves, self.watched = 1, False
        self.cache.keep_rows(self.batch)
        self.condition, self.valid = self.condition[: self.batch], self.valid[: self.batch]
        if self.bias is not None:
            self.bias = self.bias[: self.batch]
        if self.features is not None:
            self.features = self.features[: self.batch]
        if self.drafter is not None:
            self.drafter.narrow()

    def reached(self, least: int) -> bool:
        if self.halves == 1 or not self.guidance.over(least):
            return False
        self.narrow()
        return True

    def _run(self, x: Tensor, slots: Tensor, at: Tensor, attend: Attend) -> Tensor:
        """Features of embeddings x [rows, W, dim] at `slots`, turned to the slots `at`, both [rows, W]."""
        h = self.model.run(x, self.turned(at), attend, self.aux_layers)
        if self.features is not None:
            self.features[self.cache.rows, slots + 1] = h
        return h

    def _pass(self, x: Tensor, slots: Tensor, at: Tensor, seen: AttentionMetadata | Tensor, visible: int) -> Tensor:
        """Logits of embeddings x [rows, W, dim], of which each sees what is `seen` of the slots before `visible`."""
        visible -= self.folded
        self.bytes_read += len(x) * visible * self.cache.bytes_per_slot
        self._logits = self.model.logits(self._run(x, slots, at, self.cache.attend(slots - self.folded, seen, visible)))
        return self._logits

    def forward(self, tokens: Tensor, tree: Tree | None = None, first: int = 0) -> Tensor:
        count = tokens.shape[1]
        x = self.model.tok_embeddings(tokens).repeat(self.halves, 1, 1)
        if first == 0:
            fresh = (self.lengths == 0).repeat(self.halves)[:, None]
            x[:, 0] = torch.where(fresh, self.condition[:, -1], x[:, 0])
        positions = self.follows(count, tree, first)
        slots = (self.follows(count, None, first) + self.prefix - 1).repeat(self.halves, 1)
        at = slots if tree is None else (positions + self.prefix - 1).repeat(self.halves, 1)
        root = (self.root_slots() - self.folded).repeat(self.halves)
        metadata = AttentionMetadata(root, first, None if tree is None else tree.ancestors, self.bias)
        return self.guided(self._pass(x, slots, at, metadata, self.visible(first + count)), positions)

    def forward_at(self, tokens: Tensor, places: Tensor, written: Tensor) -> Tensor:
        x = self.model.tok_embeddings(tokens).repeat(self.halves, 1, 1)
        x = torch.where((places == 0)[None, :, None], self.condition[:, -1:], x)
        slots = (places + self.prefix - 1).expand(len(x), -1)
        there = torch.ones_like(self._slot, dtype=torch.bool)
        there[self.prefix - 1 :] = False
        there[self.prefix - 1 : self.prefix - 1 + len(written)] = written
        visible = self.prefix - 1 + len(written)
        mask = (self.sees(slots, visible) & there[:visible])[..., self.folded :]
        if self.bias is not None:
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
            mask[..., 0] = self.bias[:, None]
        return self.guided(self._pass(x, slots, slots, mask, visible), places.expand(self.batch, -1))

    def keep(self, path: Tensor) -> None:
        root = self.root_slots()[:, None]
        to = root + torch.arange(1, path.shape[1] + 1, device=self.device)
        source = torch.where(path > 0, root + path, to).repeat(self.halves, 1)
        to = to.repeat(self.halves, 1)
        self.cache.move(source - self.folded, to - self.folded)
        if self.features is not None:
            self.features[self.cache.rows, to + 1] = self.features[self.cache.rows, source + 1]

    def check(self) -> None:
        # What is not finite stays in the cache, so the last pass shows what happened in any before it.
        require_finite(self._logits, "The model's logits", self.model.dtype)
