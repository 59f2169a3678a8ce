"""The Session over a transformer decoder: static KV cache, both guidance batches in one pass, ragged rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from typing import ClassVar

import torch
from torch import Tensor

from visar.engine.decoder import Attend, Decoder, kv_heads
from visar.engine.feature_session import FeatureSession
from visar.engine.guidance import Guidance
from visar.engine.kv_cache import KVCache
from visar.engine.memory import streamed_bytes
from visar.engine.tree import Tree
from visar.kernels.attention import AttentionMetadata


class DecoderSession(FeatureSession):
    """Decode `length` tokens after `prefix` condition slots; a subclass embeds its conditions (`embed`).

    `table` [slots, ...] holds the rotary rows of all input positions. The cache has room for `window` - 1 tokens past
    the end, so the last window needs no special shape. With `aux_layers` it stores `features`. The first `folded` slots
    are not in the cache, for families that do not need them.
    """

    row_tensors: ClassVar[tuple[str, ...]] = ("condition", "valid", "bias", "features")
    per_token: ClassVar[int] = 1  # cache slots of a token
    bias: Tensor | None = None  # [rows], for families whose first cache slot represents several keys

    def __init__(
        self,
        model: Decoder,
        batch: int,
        prefix: int,
        table: Tensor,
        *,
        length: int,
        window: int,
        guidance: Guidance = Guidance(),
        aux_layers: Collection[int] | None = None,
        folded: int = 0,
    ):
        slots = prefix + self.per_token * (length + window) - 1
        super().__init__(
            batch, length, model.config.vocab_size, model.device, slots=slots, dtype=model.dtype, guidance=guidance,
            folded=folded,
        )  # fmt: skip
        self.model, self.table, self.prefix, self.window = model, table, prefix, window
        rows, c, device = batch * self.batches, model.config, self.device
        self.cache = KVCache(len(model.layers), rows, slots - folded, kv_heads(c), model.head_dim, model.dtype, device)
        self.aux_layers = aux_layers or ()
        shape = (rows, 1 + slots, c.dim * (1 + len(self.aux_layers)))
        self.features = None if aux_layers is None else torch.zeros(shape, dtype=model.dtype, device=device)
        self.condition = torch.zeros(rows, prefix, c.dim, dtype=model.dtype, device=device)
        self.valid = torch.ones(rows, slots, dtype=torch.bool, device=device)
        self.prefill_passes = 1 if prefix > 1 else 0

    @abstractmethod
    def embed(self, *condition: Tensor) -> Tensor:
        """Embeddings [rows, prefix, dim] of conditions; with guidance, then those of the unconditional batch."""

    @torch.inference_mode()
    def start(self, *condition: Tensor) -> None:
        """Start new images in the same buffers, for conditions of the same shapes as before."""
        self.lengths.zero_()
        self.condition.copy_(self.embed(*(part.to(self.device) for part in condition)))
        if self.prefix > 1:
            self._prefill()
        self.bytes_read = 0  # the clock starts after the prefill
        self._slots_read.zero_()

    def _prefill(self) -> None:
        """Run all condition slots but the last, which is the first pass's root."""
        before = self.prefix - 1
        at = self._slot[:before].expand(len(self.condition), -1)
        self._run(self.condition[:, :-1], at, at, self.cache.attend(at, self.attention_mask(at, before), before))

    def root_slots(self) -> Tensor:
        """The cache slots [B] of the last committed tokens, the first inputs of the next pass."""
        return self.lengths + self.prefix - 1

    def first_slots(self) -> Tensor:
        return torch.full_like(self.condition[:, :1, 0], self.prefix - 1, dtype=torch.long)

    def last_inputs(self) -> Tensor:
        return self.condition[:, -1]

    def token_embeddings(self, tokens: Tensor) -> Tensor:
        return self.model.tok_embeddings(tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)

    @property
    def head_bytes(self) -> int:
        return streamed_bytes(self.model.output)

    def attention_mask(self, slots: Tensor, visible: int, tree: Tree | None = None, first: int = 0) -> Tensor:
        slot = self._slot[:visible]
        mask = (slot <= slots[..., None]) & self.valid[:, None, :visible] | (slot == slots[..., None])
        if tree is not None:
            nodes = slot - self.root_slots()[:, None]
            mask &= (tree.ancestor_mask(first, slots.shape[1], nodes) | (nodes < 0)[:, None]).repeat(self.batches, 1, 1)
        return mask

    def rotary_rows(self, slots: Tensor) -> Tensor:
        """As in `FeatureSession`; slots past the end are clamped."""
        return self.table[slots.clamp_max(len(self.table) - 1)]

    def _run(self, x: Tensor, slots: Tensor, at: Tensor, attend: Attend) -> Tensor:
        """Features of embeddings x [rows, W, dim] at `slots`, rotated to the slots `at`, both [rows, W]."""
        h = self.model.run(x, self.rotary_rows(at), attend, self.aux_layers)
        self.store(h, slots)
        return h

    def _pass(self, x: Tensor, slots: Tensor, at: Tensor, mask: AttentionMetadata | Tensor, visible: int) -> Tensor:
        """Logits of embeddings x [rows, W, dim], which attend by `mask` to the slots before `visible`."""
        self.counted(slots, visible, isinstance(mask, Tensor))
        attend = self.cache.attend(slots - self.folded, mask, visible - self.folded)
        self.hidden = self._run(x, slots, at, attend)
        self._logits = self.model.logits(self.hidden)
        return self._logits

    def forward(self, tokens: Tensor, tree: Tree | None = None, first: int = 0) -> Tensor:
        count = tokens.shape[1]
        x = self.model.tok_embeddings(tokens).repeat(self.batches, 1, 1)
        if first == 0:
            fresh = (self.lengths == 0).repeat(self.batches)[:, None]
            x[:, 0] = torch.where(fresh, self.condition[:, -1], x[:, 0])
        positions = self.follows(count, tree, first)
        slots = (self.follows(count, None, first) + self.prefix - 1).repeat(self.batches, 1)
        at = slots if tree is None else (positions + self.prefix - 1).repeat(self.batches, 1)
        root = (self.root_slots() - self.folded).repeat(self.batches)
        metadata = AttentionMetadata(root, first, None if tree is None else tree.ancestors, self.bias)
        return self.guided(self._pass(x, slots, at, metadata, self.visible(first + count)), positions)

    def forward_at(self, tokens: Tensor, positions: Tensor, written: Tensor) -> Tensor:
        x = self.model.tok_embeddings(tokens).repeat(self.batches, 1, 1)
        x = torch.where((positions == 0)[None, :, None], self.condition[:, -1:], x)
        slots = (positions + self.prefix - 1).expand(len(x), -1)
        there = torch.ones_like(self._slot, dtype=torch.bool)
        there[self.prefix - 1 :] = False
        there[self.prefix - 1 : self.prefix - 1 + len(written)] = written
        visible = self.prefix - 1 + len(written)
        mask = self._biased((self.attention_mask(slots, visible) & there[:visible])[..., self.folded :])
        return self.guided(self._pass(x, slots, slots, mask, visible), positions.expand(self.batch, -1))

    def _biased(self, mask: Tensor) -> Tensor:
        """A mask [rows, W, slots], bool, as `KVCache.attend` takes it, where the first slot may be several keys."""
        if self.bias is None:
            return mask
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
        mask[..., 0] = self.bias[:, None]
        return mask

    def keep(self, path: Tensor) -> None:
        root = self.root_slots()[:, None]
        to = root + torch.arange(1, path.shape[1] + 1, device=self.device)
        source = torch.where(path > 0, root + path, to).repeat(self.batches, 1)
        to = to.repeat(self.batches, 1)
        self.cache.move(source - self.folded, to - self.folded)
        self.move_features(source, to)
