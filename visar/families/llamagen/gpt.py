"""The GPT of LlamaGen (Sun et al. 2024, arXiv:2406.06525), class- and text-conditional, with its published keys.

The module holds weights and the arithmetic of one pass. Caches, guidance and positions in progress belong to the
engine, which calls `run`; training and scoring call `forward` on whole sequences.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visar.engine.component import Component
from visar.engine.decoder import Attend
from visar.engine.layers import Linear, RMSNorm, check_heads, run_linear
from visar.errors import VisarError
from visar.families.llamagen.rotary import rotary_table, turned
from visar.reading import Count, Side, Size


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        check_heads(dim, heads, multiple=4)  # its rotary angles are of rows and of columns
        self.heads = heads
        self.wqkv = Linear(dim, 3 * dim, bias=False)
        self.wo = Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, table: Tensor, attend: Attend, layer: int, residual: Tensor) -> Tensor:
        """`residual` plus what x attends to."""
        qkv = self.wqkv(x).unflatten(-1, (3 * self.heads, -1))
        return run_linear(self.wo, attend(layer, qkv, table).flatten(-2), plus=residual)


class FeedForward(nn.Module):
    """SwiGLU; w1 is the gate, w3 the value, w2 the way back."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1 = Linear(dim, hidden, bias=False)
        self.w3 = Linear(dim, hidden, bias=False)
        self.w2 = Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """`residual` plus what the layer makes of x."""
        gated = run_linear(self.w3, x, times=run_linear(self.w1, x, silu=True))
        return run_linear(self.w2, gated, plus=residual)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.attention = Attention(dim, heads)
        self.feed_forward = FeedForward(dim, hidden)
        self.attention_norm = RMSNorm(dim)
        self.ffn_norm = RMSNorm(dim)

    def forward(self, x: Tensor, table: Tensor, attend: Attend, layer: int) -> Tensor:
        x = self.attention(self.attention_norm(x), table, attend, layer, x)
        return self.feed_forward(self.ffn_norm(x), x)


class ClassEmbedding(nn.Module):
    """One slot per class; the last row of the table is the null class of the unconditional half."""

    def __init__(self, classes: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)

    def forward(self, ids: Tensor) -> Tensor:
        """[B] -> [B, 1, dim]."""
        return self.embedding_table(ids).unsqueeze(1)

    def null_like(self, ids: Tensor) -> Tensor:
        return torch.full_like(ids, self.embedding_table.num_embeddings - 1)


class CaptionProjection(nn.Module):
    def __init__(self, features: int, dim: int):
        super().__init__()
        self.fc1 = Linear(features, dim, bias=False)
        self.fc2 = Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedding(nn.Module):
    """Left-padded caption features through a projector; the unconditional features are a fixed random buffer."""

    uncond_embedding: Tensor

    def __init__(self, length: int, features: int, dim: int):
        super().__init__()
        self.cap_proj = CaptionProjection(features, dim)
        self.register_buffer("uncond_embedding", nn.init.normal_(torch.empty(length, features), std=features**-0.5))

    def forward(self, features: Tensor) -> Tensor:
        """[B, T, features] -> [B, T, dim]."""
        return self.cap_proj(features.to(self.cap_proj.fc1.weight.dtype))

    def null_like(self, features: Tensor) -> Tensor:
        return self.uncond_embedding.expand_as(features)


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention [B, heads, W, head_dim] where `mask` [B, 1, W, W] is 0, and none where it is -inf.

    Written out for gradients in bfloat16 on a CPU: torch's fused kernel takes twice as long backwards there.
    """
    if not (q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask
    return scores.softmax(-1).to(v.dtype) @ v


class LlamaGen(Component):
    """LlamaGen's GPT.

    `condition` is "class" or "text"; `condition_length` T is the number of condition slots before the image tokens (1
    for classes, 120 for the published text model); `grid` is the default number of cells along one side.
    """

    scan: ClassVar[str] = "raster"  # as in `visar.families.base.Family`

    def __init__(
        self,
        vocab_size: Size = 16384,
        dim: Size = 768,
        num_layers: Count = 12,
        num_heads: Size = 12,
        ffn: Size = 2048,
        condition: Literal["class", "text"] = "class",
        condition_length: Size = 1,
        classes: Size = 1000,
        caption_features: Size = 2048,
        grid: Side = 16,
    ):
        super().__init__()
        if condition == "class" and condition_length != 1:
            raise VisarError(f"A class has one condition slot, not {condition_length}.")
        self.tok_embeddings = nn.Embedding(vocab_size, dim)
        self.cls_embedding = (
            ClassEmbedding(classes, dim)
            if condition == "class"
            else CaptionEmbedding(condition_length, caption_features, dim)
        )
        self.layers = nn.ModuleList(Block(dim, num_heads, ffn) for _ in range(num_layers))
        self.norm = RMSNorm(dim)
        self.output = Linear(dim, vocab_size, bias=False)

    @property
    def head_dim(self) -> int:
        return self.config.dim // self.config.num_heads

    def rotary(self, grid: int | None = None) -> Tensor:
        """The position table for a grid of cells, [T + grid**2, head_dim / 2, 2] fp32, on this model's device."""
        table = rotary_table(self.config.condition_length, grid or self.config.grid, self.head_dim)
        return table.to(self.output.weight.device)

    def run(self, x: Tensor, table: Tensor, attend: Attend, aux_layers: Collection[int] = ()) -> Tensor:
        """Normed features [B, W, dim] for embeddings x [B, W, dim] at the rotary rows `table`; `logits` reads them.

        Behind them stand the outputs of the layers `aux_layers`, if any are asked for: [B, W, dim * (1 + aux_layers)].
        """
        aux = []
        for i, block in enumerate(self.layers):
            x = block(x, table, attend, i)
            if i in aux_layers:
                aux.append(x)
        return torch.cat([self.norm(x), *aux], dim=-1) if aux else self.norm(x)

    def logits(self, features: Tensor) -> Tensor:
        """Logits [B, W, vocab_size], fp32, of features [B, W, dim]; auxiliary hidden states are ignored."""
        return self.output(features[..., : self.config.dim]).float()

    def forward(self, condition: Tensor, tokens: Tensor, condition_mask: Tensor | None = None) -> Tensor:
        """Logits [B, n + 1, vocab_size] of the tokens 0..n at full length, without a cache.

        `condition`: class ids [B] or caption features [B, T, features]; `tokens`: image ids [B, n] with n at most
        grid**2 - 1 for a next token to exist; `condition_mask`: valid caption slots [B, T], bool.
        """
        x = torch.cat([self.cls_embedding(condition), self.tok_embeddings(tokens)], dim=1)
        table = self.rotary()[: x.shape[1]].expand(len(x), -1, -1, -1)
        return self.logits(self.causal(x, table, condition_mask)[:, self.config.condition_length - 1 :])

    def causal(self, x: Tensor, table: Tensor, condition_mask: Tensor | None = None) -> Tensor:
        """`run` without a cache: each of the embeddings x [B, L, dim], the condition's first, attends to those before.

        `table` [B, L, ...] are their rotary rows.
        """
        length, prefix = x.shape[1], self.config.condition_length
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril().expand(len(x), 1, -1, -1)
        if condition_mask is not None:
            valid = F.pad(condition_mask.bool(), (0, length - prefix), value=True)
            own = torch.eye(length, dtype=torch.bool, device=x.device)  # padded rows attend to themselves
            mask = mask & (valid[:, None, None, :] | own)
        bias = torch.zeros(mask.shape, device=x.device).masked_fill(~mask, -torch.inf)

        def attend(_: int, qkv: Tensor, turns: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in turned(qkv, turns))
            return attended(q, k, v, bias.to(q.dtype)).transpose(1, 2)

        return self.run(x, table, attend)


def initialise(gpt: LlamaGen) -> LlamaGen:
    """Normal(0, 0.02) weights, the ways back into the residual stream scaled down with depth.

    The caption projector starts at a gain of about 1: caption features that enter much smaller than what the blocks add
    are learnt too late, when images are already known by heart from their first tokens.
    """
    for name, p in gpt.named_parameters():
        if p.ndim == 2:
            back = name.endswith(("wo.weight", "w2.weight"))
            std = 0.02 / math.sqrt(2 * gpt.config.num_layers) if back else 0.02
            if "cap_proj" in name:
                std = 1.0 if "fc1" in name else 1.0 / math.sqrt(p.shape[1])
            nn.init.normal_(p, std=std)
    return gpt
