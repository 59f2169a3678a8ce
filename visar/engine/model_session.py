"""The Session over a LlamaGen-like transformer: static KV cache, both guidance halves in one pass, ragged rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visar.engine.guidance import Guidance
from visar.engine.session import Session
from visar.errors import VisarError
from visar.models.llamagen import LlamaGen


class KVCache:
    """Static keys and values, [layers, rows, slots, heads, head_dim] each. Slots are overwritten, never moved."""

    def __init__(self, model: LlamaGen, rows: int, slots: int):
        c = model.config
        shape = (c.num_layers, rows, slots, c.num_heads, model.head_dim)
        # Zeros, not empty: a masked slot has weight 0, and 0 times what was in memory could be NaN.
        self.keys, self.values = (torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        self.rows = torch.arange(rows, device=model.device)[:, None]

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v [rows, W, heads, head_dim] at slots [rows, W]."""
        self.keys[layer, self.rows, slots] = k
        self.values[layer, self.rows, slots] = v

    @property
    def bytes_per_slot(self) -> int:
        """Bytes that one slot of one row takes over all layers."""
        layers, _, _, heads, dim = self.keys.shape
        return 2 * layers * heads * dim * self.keys.element_size()


class ModelSession(Session):
    """Decode `length` tokens for a batch of conditions.

    `condition`: class ids [B] or caption features [B, T, C] with `condition_mask` [B, T]. With guidance the model runs
    on 2B rows, conditional half first; both halves see the same drafts and the same caption mask. The cache has room
    for `window` - 1 tokens past the end, so the last window needs no special shape.
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
    ):
        super().__init__(len(condition), length, model.config.vocab_size, model.device)
        self.model, self.guidance = model, guidance
        self.halves = 2 if guidance.active else 1
        self.prefix = model.config.condition_length
        self.table = model.rotary(grid)
        self.cache = KVCache(model, self.batch * self.halves, self.prefix + length + window - 1)
        self.prefill_passes = 0
        valid = torch.ones(self.batch, self.cache.keys.shape[2], dtype=torch.bool, device=self.device)
        if condition_mask is not None:
            valid[:, : self.prefix] = condition_mask.to(self.device)
        self.valid = valid.repeat(self.halves, 1)
        self._slot = torch.arange(valid.shape[1], device=self.device)
        self.bytes_read = 0
        self._prefill(condition.to(self.device))

    @torch.inference_mode()
    def _prefill(self, condition: Tensor) -> None:
        """Embed the condition and run all its slots but the last, which is the first pass's root."""
        embed = self.model.cls_embedding
        parts = [embed(condition)] + ([embed(embed.null_like(condition))] if self.halves == 2 else [])
        x = torch.cat(parts)
        self.root = x[:, -1]  # [rows, dim]
        if self.prefix > 1:
            self._pass(x[:, :-1], torch.arange(self.prefix - 1, device=self.device).expand(len(x), -1), self.prefix - 1)
            self.prefill_passes = 1
            self.bytes_read = 0  # what is timed begins behind the prefill

    def _pass(self, x: Tensor, slots: Tensor, visible: int) -> Tensor:
        """Run embeddings x [rows, W, dim] at slots [rows, W], reading the first `visible` slots of the cache."""
        own = self._slot[:visible] == slots[..., None]
        mask = (self._slot[:visible] <= slots[..., None]) & self.valid[:, None, :visible] | own
        mask = mask.unsqueeze(1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.cache.write(layer, slots, k, v)
            k, v = self.cache.keys[layer, :, :visible], self.cache.values[layer, :, :visible]
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

        self.bytes_read += len(x) * visible * self.cache.bytes_per_slot
        return self.model.run(x, self.table[slots.clamp_max(len(self.table) - 1)], attend)

    def _visible(self, window: int) -> int:
        """How much of the cache a pass reads. Asking a GPU for the lengths would make the host wait, so all of it."""
        if self.device.type != "cpu":
            return self.cache.keys.shape[2]
        return self.prefix - 1 + int(self.lengths.max()) + window

    def forward(self, tokens: Tensor) -> Tensor:
        window = tokens.shape[1]
        x = self.model.tok_embeddings(tokens).repeat(self.halves, 1, 1)
        fresh = (self.lengths == 0).repeat(self.halves)[:, None]
        x[:, 0] = torch.where(fresh, self.root, x[:, 0])
        slots = (self.positions(window) + self.prefix - 1).repeat(self.halves, 1)
        logits = self._logits = self._pass(x, slots, self._visible(window))
        if self.halves == 1:
            return logits
        cond, uncond = logits.chunk(2)
        return self.guidance.combine(cond, uncond, self.positions(window))

    def check(self) -> None:
        # What is not finite stays in the cache, so the last pass shows what happened in any before it.
        if not bool(torch.isfinite(self._logits).all()):
            name = str(self.model.dtype).removeprefix("torch.")
            raise VisarError(f"The model's logits are not finite in {name}; load it in bfloat16 or float32.")
