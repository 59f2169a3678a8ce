"""RandAR (Pang et al. 2024, arXiv:2412.01827): a LlamaGen that samples the cells of an image in any order.

Before each token comes a query, one learnt vector that is turned by the rotary row of the cell to sample next, and the
token after it has the row of the same cell. So p(token of a cell | tokens of other cells, in their order) is defined
for every order, and each order has a joint distribution of its own. The module has the published keys. Sizes, keys and
arithmetic are those of the authors' code (MIT licence), of which nothing is copied.
"""

from __future__ import annotations

from functools import wraps
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.rotary import rotate


class RandAR(LlamaGen):
    """A LlamaGen with the vector of its queries, `pos_instruct_embeddings` [1, dim]."""

    scan: ClassVar[str] = "any"

    @wraps(LlamaGen.__init__)  # type: ignore[misc]
    def __init__(self, *sizes: Any, **named: Any):
        super().__init__(*sizes, **named)
        self.pos_instruct_embeddings = nn.Parameter(torch.empty(1, self.config.dim))
        nn.init.normal_(self.pos_instruct_embeddings, std=0.02)

    def queries(self, rows: Tensor) -> Tensor:
        """The queries [..., dim] for cells of the rotary rows [..., head_dim / 2, 2]."""
        heads = self.pos_instruct_embeddings.view(self.config.num_heads, -1)
        return rotate(heads.expand(*rows.shape[:-2], -1, -1), rows).flatten(-2)

    def forward(  # type: ignore[override]
        self, condition: Tensor, tokens: Tensor, condition_mask: Tensor | None = None, cells: Tensor | None = None
    ) -> Tensor:
        """Logits [B, n + 1, vocab_size] of the first n + 1 cells of an order, without a cache.

        As `LlamaGen.forward`, but `tokens` [B, n] are those of the first n of `cells` [B, N], by default in raster
        order.
        """
        count, prefix = tokens.shape[1] + 1, self.config.condition_length
        table = self.rotary()
        at = torch.arange(count, device=table.device).expand(len(tokens), -1) if cells is None else cells[:, :count]
        rows = table[prefix + at]
        queries = self.queries(rows)
        pairs = torch.stack([queries[:, :-1], self.tok_embeddings(tokens)], dim=2).flatten(1, 2)
        x = torch.cat([self.cls_embedding(condition), pairs, queries[:, -1:]], dim=1)
        both = torch.cat([table[:prefix].expand(len(x), -1, -1, -1), rows.repeat_interleave(2, 1)[:, :-1]], dim=1)
        return self.logits(self.causal(x, both, condition_mask)[:, prefix::2])
