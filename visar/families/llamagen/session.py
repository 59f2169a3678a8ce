"""The session of a LlamaGen, whose condition slots are one slot of the cache."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from visar.engine.decoder_session import DecoderSession
from visar.engine.guidance import Guidance
from visar.families.llamagen.gpt import LlamaGen
from visar.kernels.invariant import is_invariant


class LlamaGenSession(DecoderSession):
    """Decode for class ids [B], or caption features [B, T, C] with a mask [B, T] that is false for padding."""

    model: LlamaGen

    def __init__(
        self,
        model: LlamaGen,
        *condition: Tensor | None,  # and of a caption its mask
        length: int,
        window: int,
        grid: int | None = None,
        guidance: Guidance = Guidance(),
        aux_layers: Collection[int] | None = None,
    ):
        prefix, given = model.config.condition_length, [part for part in condition if part is not None]
        super().__init__(
            model, len(given[0]), prefix, model.rotary(grid), length=length, window=window, guidance=guidance,
            aux_layers=aux_layers, folded=max(prefix - 2, 0),
        )  # fmt: skip
        self.bias = torch.zeros(len(self.condition), device=self.device) if prefix > 1 else None
        self.start(*given)

    def embed(self, *condition: Tensor) -> Tensor:
        values, *masks = condition
        if masks:
            self.valid[:, : self.prefix] = masks[0].repeat(self.batches, 1)
        embed = self.model.cls_embedding
        return torch.cat([embed(values)] + ([embed(embed.null_like(values))] if self.batches == 2 else []))

    def _prefill(self) -> None:
        """Run all condition slots but the last, which is the first pass's root, and fold them into one cache slot.

        Their rotary rows are zero, and so are their queries and keys: each attends uniformly to the valid slots up to
        its own, and later inputs find n keys of logit 0. One key of logit log n with the mean value is equivalent.
        """
        before = self.prefix - 1
        at = self._slot[:before].expand(len(self.condition), -1)
        wide = torch.float64 if is_invariant() else torch.float32  # so that no sum depends on the batch
        mask = self.attention_mask(at, before).to(wide)
        share = mask / mask.sum(-1, keepdim=True)
        valid = self.valid[:, :before].to(wide)
        count = valid.sum(-1, keepdim=True)
        assert self.bias is not None
        self.bias.copy_(count[:, 0].log())  # -inf if none is valid
        mean = valid / count.clamp_min(1)

        def attend(layer: int, qkv: Tensor, _: Tensor) -> Tensor:
            v = qkv[:, :, 2 * self.model.config.num_heads :].to(wide)
            self.cache.values[layer, :, 0] = torch.einsum("rs,rshd->rhd", mean, v).to(self.cache.values.dtype)
            return torch.einsum("rqs,rshd->rqhd", share, v).to(qkv.dtype)

        self._run(self.condition[:, :-1], at, at, attend)
