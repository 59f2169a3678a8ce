"""The baseline that users of LlamaGen (Sun et al. 2024, arXiv:2406.06525) run today: a plain eager loop, as published.

It is written from the description of that loop and lives in the benchmark alone; it is no sampler. What makes it slow
is what makes the published one slow: every step reads the whole padded cache under an explicit boolean mask, computes
the conditional and the unconditional rows as one batch, and launches each operation by itself. Nothing is slower than
it must be for that: no copies of the cache, no read from the device by the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from visar.engine.guidance import Guidance
from visar.families.llamagen.gpt import Block, LlamaGen


class EagerLoop:
    """`length` tokens of a batch of conditions, one per call: `prefill`, then `step` for each token sampled.

    `condition`: class ids [B] or caption features [B, T, C] with `condition_mask` [B, T]. The weights are those of
    `model`; the layers are run here, so that nothing that makes our own pass fast helps the baseline, or slows it.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: LlamaGen,
        condition: Tensor,
        condition_mask: Tensor | None = None,
        *,
        length: int,
        grid: int | None = None,
        guidance: Guidance = Guidance(),
    ):
        c, device = model.config, model.device
        self.model, self.guidance, self.length, self.prefix = model, guidance, length, c.condition_length
        condition = condition.to(device)
        parts = [condition] + ([model.cls_embedding.null_like(condition)] if guidance.active else [])
        self.condition = model.cls_embedding(torch.cat(parts))  # conditional and unconditional, [rows, T, dim]
        rows, slots = len(self.condition), -(-(self.prefix + length) // 8) * 8
        shape = (c.num_layers, rows, c.num_heads, slots, model.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=model.dtype, device=device) for _ in range(2))
        mask = torch.ones(slots, slots, dtype=torch.bool, device=device).tril().repeat(rows, 1, 1)
        if condition_mask is not None:
            valid = condition_mask.to(device).bool().repeat(rows // len(condition_mask), 1)
            mask[:, :, : self.prefix] &= valid[:, None]
            mask |= torch.eye(slots, dtype=torch.bool, device=device)  # padded rows attend to themselves
        self.mask = mask
        self.table = model.rotary(grid)
        self.slots = torch.arange(self.prefix, device=device)
        self.steps = 0

    def skip_to(self, steps: int) -> None:
        """Go on as if so many tokens had been sampled, without running them: for timing alone."""
        self.steps = steps
        self.slots = torch.tensor([self.prefix + steps - 1], device=self.slots.device)

    @torch.inference_mode()
    def prefill(self) -> Tensor:
        """Run the condition: guided logits [B, V], fp32, of the first token."""
        logits = self._guided(self._forward(self.condition, self.slots))
        self.slots = self.slots[-1:].clone()
        return logits

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Guided logits [B, V], fp32, of the token that follows `tokens` [B], the last ones sampled."""
        if self.guidance.active:
            tokens = torch.cat([tokens, tokens])
        self.slots += 1
        self.steps += 1
        return self._guided(self._forward(self.model.tok_embeddings(tokens[:, None]), self.slots))

    def _guided(self, logits: Tensor) -> Tensor:
        if not self.guidance.active:
            return logits
        cond, uncond = logits.chunk(2)
        if -1 < self.guidance.interval < self.steps - 1:
            return cond  # the unconditional rows were computed all the same
        return uncond + (cond - uncond) * self.guidance.scale

    def _forward(self, x: Tensor, slots: Tensor) -> Tensor:
        """Logits [rows, V] after the last of the embeddings x [rows, n, dim] at `slots` [n]."""
        mask, table = self.mask[:, None, slots], self.table[slots]
        with sdpa_kernel(SDPBackend.MATH):  # the one that the published loop forces
            for i, block in enumerate(self.model.layers):
                x = self._block(i, block, x, table, slots, mask)  # type: ignore[arg-type]
        return F.linear(_norm(x, self.model.norm.weight), self.model.output.weight)[:, -1].float()

    def _block(self, i: int, block: Block, x: Tensor, table: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
        a, f = block.attention, block.feed_forward
        q, k, v = F.linear(_norm(x, block.attention_norm.weight), a.wqkv.weight).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.keys.shape[2], -1)) for t in (q, k, v))
        q, k, v = (t.transpose(1, 2) for t in (_rotated(q, table), _rotated(k, table), v))
        keys, values = self.keys[i], self.values[i]
        keys[:, :, slots], values[:, :, slots] = k, v
        h = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        x = x + F.linear(h.transpose(1, 2).flatten(-2), a.wo.weight)
        y = _norm(x, block.ffn_norm.weight)
        return x + F.linear(F.silu(F.linear(y, f.w1.weight)) * F.linear(y, f.w3.weight), f.w2.weight)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)).type_as(x) * weight


def _rotated(x: Tensor, table: Tensor) -> Tensor:
    """x [rows, n, heads, head_dim] turned in adjacent pairs by `table` [n, head_dim / 2, 2], in fp32."""
    (a, b), (cos, sin) = x.float().unflatten(-1, (-1, 2)).unbind(-1), table.unsqueeze(1).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).type_as(x)


def sample_tokens(logits: Tensor, temperature: float = 1.0, top_k: int = 0) -> Tensor:
    """Tokens [B] from logits [B, V]: temperature, top-k with ties, softmax, and torch's global generator."""
    x = logits / max(temperature, 1e-5)
    if top_k > 0:
        x = x.masked_fill(x < torch.topk(x, min(top_k, x.shape[-1])).values[..., -1:], -torch.inf)
    return torch.multinomial(x.softmax(-1), 1).squeeze(-1)


def generate(loop: EagerLoop, temperature: float = 1.0, top_k: int = 0) -> Tensor:
    """All tokens [B, N] of a fresh loop."""
    tokens = [sample_tokens(loop.prefill(), temperature, top_k)]
    for _ in range(loop.length - 1):
        tokens.append(sample_tokens(loop.step(tokens[-1]), temperature, top_k))
    return torch.stack(tokens, 1)
