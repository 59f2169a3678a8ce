"""The session of a decoder after prompts of any length: each row, of either guidance batch, has a prompt of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection

import torch
from torch import Tensor

from visar.engine.feature_session import FeatureSession
from visar.engine.guidance import Guidance
from visar.engine.tree import Tree
from visar.errors import VisarError
from visar.kernels.attention import MOST_QUERIES, AttentionMetadata


class PromptSession(FeatureSession):
    """Decode `length` tokens after prompts of at most `width` slots each.

    Prompts lie in the first slots and are padded on the right. What is there after a prompt is overwritten before
    anything attends to it, so no mask is ever made: a row's slots follow from `prefix` [rows] alone, its root lies in
    slot `prefix` - 1 + `lengths`, and slots are positions. The last slot of a prompt is the first pass's root, whose
    embeddings are kept in `last` [rows, dim]. A subclass makes the cache, and runs the model. With `aux_layers` the
    session stores `features`, and keeps the embeddings of prompts.
    """

    row_tensors = ("prefix", "last", "features", "prompt")
    prompt: Tensor | None = None  # [rows, width, dim], with features

    def __init__(
        self,
        batch: int,
        length: int,
        vocab: int,
        device: torch.device,
        *,
        width: int,
        dim: int,
        window: int,
        dtype: torch.dtype,
        guidance: Guidance = Guidance(),
        aux_layers: Collection[int] | None = None,
    ):
        slots = width + length + window - 1
        super().__init__(batch, length, vocab, device, slots=slots, dtype=dtype, guidance=guidance)
        rows = batch * self.batches
        self.width, self.window = width, window
        self.prefix = torch.ones(rows, dtype=torch.long, device=self.device)
        self.last = torch.zeros(rows, dim, dtype=dtype, device=self.device)
        self.aux_layers = aux_layers or ()
        if aux_layers is not None:
            stored = dim * (1 + len(aux_layers))
            self.features = torch.zeros(rows, 1 + slots, stored, dtype=dtype, device=self.device)
            self.prompt = torch.zeros(rows, width, dim, dtype=dtype, device=self.device)

    @abstractmethod
    def prompts(self, *condition: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [rows, T, dim] of prompts padded on the right, and their lengths [rows], from 1 to T.

        The conditional batch comes first, and with guidance the unconditional one follows.
        """

    @abstractmethod
    def token_embeddings(self, tokens: Tensor) -> Tensor:
        """Embeddings [B, W, dim] of tokens [B, W]."""

    @abstractmethod
    def run(self, x: Tensor, slots: Tensor, at: Tensor, mask: AttentionMetadata | Tensor, visible: int) -> Tensor:
        """Hidden states [rows, W, dim] of embeddings x, written at `slots` and rotated to the slots `at`, [rows, W].

        They attend by `mask`, as in `KVCache.attend`, to the slots before `visible`. Outputs of the `aux_layers` follow
        them.
        """

    @property
    def condition(self) -> Tensor:  # type: ignore[override]
        assert self.prompt is not None
        return self.prompt

    def first_slots(self) -> Tensor:
        return (self.prefix - 1)[:, None]

    def last_inputs(self) -> Tensor:
        return self.last

    def attention_mask(self, slots: Tensor, visible: int, tree: Tree | None = None, first: int = 0) -> Tensor:
        slot = self._slot[:visible]
        mask = slot <= slots[..., None]
        if tree is not None:
            nodes, count = slot - self.root_slots()[:, None], slots.shape[1]
            own = torch.cat([tree.ancestor_mask(first, count, part) for part in nodes.chunk(self.batches)])
            mask = mask & (own | (nodes < 0)[:, None])
        return mask

    @torch.inference_mode()
    def start(self, *condition: Tensor) -> None:
        """Start new images in the same buffers. Raises `VisarError` for prompts of more than `width` slots."""
        x, prefix = self.prompts(*condition)
        if (longest := int(prefix.max())) > self.width:
            raise VisarError(f"This session has room for prompts of {self.width} slots, not {longest}.")
        self.lengths.zero_()
        self.prefix.copy_(prefix)
        rows = torch.arange(len(x), device=self.device)
        self.last.copy_(x[rows, self.prefix - 1])
        if self.prompt is not None:
            self.prompt.zero_()[:, : x.shape[1]] = x[:, : self.width]
        self.prefill_passes = 0
        for first in range(0, longest - 1, MOST_QUERIES):  # the last slot of the longest prompt is a root, too
            part = x[:, first : min(first + MOST_QUERIES, longest - 1)]
            at = self._slot[first : first + part.shape[1]].expand(len(x), -1)
            mask = AttentionMetadata(torch.zeros_like(self.prefix), first)
            self.store(self.run(part, at, at, mask, first + part.shape[1]), at)
            self.prefill_passes += 1
        self.bytes_read = 0  # the clock starts after the prefill
        self._slots_read.zero_()

    def root_slots(self) -> Tensor:
        """The cache slots [rows] of the last committed tokens, the first inputs of the next pass."""
        return self.prefix - 1 + self.lengths.repeat(self.batches)

    def forward(self, tokens: Tensor, tree: Tree | None = None, first: int = 0) -> Tensor:
        count = tokens.shape[1]
        x = self.token_embeddings(tokens).repeat(self.batches, 1, 1)
        if first == 0:
            fresh = (self.lengths == 0).repeat(self.batches)[:, None]
            x[:, 0] = torch.where(fresh, self.last, x[:, 0])
        positions, before = self.follows(count, tree, first), (self.prefix - 1)[:, None]
        slots = before + self.follows(count, None, first).repeat(self.batches, 1)
        at = slots if tree is None else before + positions.repeat(self.batches, 1)
        metadata = AttentionMetadata(self.root_slots(), first, None if tree is None else tree.ancestors)
        return self._pass(x, slots, at, metadata, self.visible(first + count), positions)

    def forward_at(self, tokens: Tensor, positions: Tensor, written: Tensor) -> Tensor:
        x = self.token_embeddings(tokens).repeat(self.batches, 1, 1)
        x = torch.where((positions == 0)[None, :, None], self.last[:, None], x)
        before = (self.prefix - 1)[:, None]
        slots = before + positions
        visible = len(self._slot) if self.device.type != "cpu" else int(before.max()) + len(written)
        node = self._slot[:visible] - before  # [rows, visible]: the position of each slot, negative within the prompt
        there = (node < 0) | written[node.clamp(0, len(written) - 1)] & (node < len(written))
        mask = (node[:, None] <= positions[:, None]) & (there[:, None] | (node[:, None] == positions[:, None]))
        return self._pass(x, slots, slots, mask, visible, positions.expand(self.batch, -1))

    def _pass(
        self, x: Tensor, slots: Tensor, at: Tensor, mask: AttentionMetadata | Tensor, visible: int, positions: Tensor
    ) -> Tensor:
        self.counted(slots, visible, isinstance(mask, Tensor))
        hidden = self.run(x, slots, at, mask, visible)
        self.store(hidden, slots)
        self._logits = self.logits(hidden)
        return self.guided(self._logits, positions)

    def keep(self, path: Tensor) -> None:
        root, path = self.root_slots()[:, None], path.repeat(self.batches, 1)
        to = root + torch.arange(1, path.shape[1] + 1, device=self.device)
        source = torch.where(path > 0, root + path, to)
        self.cache.move(source, to)
        self.move_features(source, to)
