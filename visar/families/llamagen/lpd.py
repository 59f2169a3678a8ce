"""LPD (Zhang et al. 2025, arXiv:2507.01957): a transformer over LlamaGen's codes that samples cells in any order.

A token is read at the learnt position of its cell; a query is the mask token at the position of the cell to sample
next, sees the class, all tokens before it and itself, and is seen by nothing. Here one cell follows the other, which is
the model's distribution for groups of one; the authors sample the cells of a group independently of each other.

Sizes, keys and arithmetic are those of the authors' code (MIT licence), of which nothing is copied.
"""

from __future__ import annotations

from functools import wraps
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visar.engine.decoder import Attend
from visar.engine.layers import Linear, run_linear
from visar.errors import VisarError
from visar.families.llamagen.gpt import LlamaGen, attended

EPS = 1e-6
KEYS = {"tok_embeddings": "token_emb", "layers": "blocks", "output": "head"}  # ours, and the authors'


class LPDAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)


class LPDMLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)


class LPDBlock(nn.Module):
    """timm's vision transformer block, key for key."""

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = LPDAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = LPDMLP(dim, hidden)

    def forward(self, x: Tensor, table: Tensor, attend: Attend, layer: int) -> Tensor:
        qkv = self.attn.qkv(self.norm1(x)).unflatten(-1, (3 * self.attn.heads, -1))
        x = run_linear(self.attn.proj, attend(layer, qkv, table).flatten(-2), plus=x)
        return run_linear(self.mlp.fc2, F.gelu(self.mlp.fc1(self.norm2(x))), plus=x)


class LPD(LlamaGen):
    """A class-conditional LPD. The names of its parts are LlamaGen's where it has them."""

    scan: ClassVar[str] = "any"

    @wraps(LlamaGen.__init__)  # type: ignore[misc]
    def __init__(self, *sizes: Any, **named: Any):
        super().__init__(*sizes, **named)
        c = self.config
        if c.condition != "class":
            raise VisarError(f"An LPD takes classes, not {c.condition!r}.")
        self.layers = nn.ModuleList(LPDBlock(c.dim, c.num_heads, c.ffn) for _ in range(c.num_layers))
        self.norm = nn.LayerNorm(c.dim, eps=EPS)  # type: ignore[assignment]
        self.z_proj_ln = nn.LayerNorm(c.dim, eps=EPS)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        self.pos_embed = nn.Parameter(nn.init.normal_(torch.empty(1, 1 + c.grid**2, c.dim), std=0.02))

    def rotary(self, grid: int | None = None) -> Tensor:
        """Rows that turn by nothing, [1 + grid**2, head_dim / 2, 2]. Raises `VisarError` for another grid."""
        if grid not in (None, own := self.config.grid):
            raise VisarError(f"This LPD has learnt the positions of {own} x {own} cells, not of {grid} x {grid}.")
        still = torch.tensor([1.0, 0.0], device=self.output.weight.device)
        return still.expand(1 + own**2, self.head_dim // 2, 2).contiguous()

    def placed(self, x: Tensor, at: Tensor) -> Tensor:
        """Inputs [..., dim] at the positions `at` [...]: 0 is the class, and 1 + n cell n."""
        return self.z_proj_ln(x + self.pos_embed[0, at])

    def queries(self, at: Tensor) -> Tensor:
        """The queries [..., dim] for the cells at positions `at` [...]."""
        return self.placed(self.mask_token[0, 0], at)

    def forward(  # type: ignore[override]
        self, condition: Tensor, tokens: Tensor, condition_mask: Tensor | None = None, cells: Tensor | None = None
    ) -> Tensor:
        """Logits [B, n + 1, vocab_size] of the first n + 1 cells of an order, without a cache; as `RandAR.forward`."""
        batch, count = len(tokens), tokens.shape[1] + 1
        own = torch.arange(count, device=tokens.device).expand(batch, -1) if cells is None else cells[:, :count]
        at = F.pad(1 + own, (1, 0))  # the class, then the cells
        read = torch.cat([self.cls_embedding(condition), self.tok_embeddings(tokens)], dim=1)
        x = torch.cat([self.placed(read, at[:, :-1]), self.queries(at[:, 1:])], dim=1)
        seen = torch.ones(count, count, dtype=torch.bool, device=x.device).tril()
        itself = torch.eye(count, dtype=torch.bool, device=x.device)
        mask = torch.cat([F.pad(seen, (0, count)), torch.cat([seen, itself], dim=1)])
        bias = torch.zeros(mask.shape, device=x.device).masked_fill(~mask, -torch.inf).expand(batch, 1, -1, -1)

        def attend(_: int, qkv: Tensor, table: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in qkv.chunk(3, dim=2))
            return attended(q, k, v, bias.to(q.dtype)).transpose(1, 2)

        return self.logits(self.run(x, self.rotary(), attend)[:, count:])


def their_keys(model: LPD) -> dict[str, str]:
    """The authors' name of each tensor. The vector without a class is the last row of the table of classes."""
    parts = {key: key.partition(".") for key in model.state_dict()}
    names = {key: KEYS.get(first, first) + dot + rest for key, (first, dot, rest) in parts.items()}
    return names | {"cls_embedding.embedding_table.weight": "class_emb.weight"}
