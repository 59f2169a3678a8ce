"""Draft heads on the target's feature, head i for the token i behind the root.

Medusa's (Cai et al. 2024, arXiv:2401.10774) see nothing but the feature one slot before the root; Hydra's (Ankner et
al. 2024, arXiv:2402.05109) see the root and the drafts on the way as well.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visar.engine.component import Component
from visar.engine.layers import Linear, RMSNorm


class DraftHeads(Component):
    """`depth` residual blocks of two matrices; before training all give the target's own law of the root.

    `reads_tokens` makes them Hydra's; `target` is the fingerprint of the model that they were trained for.
    """

    def __init__(self, dim: int = 1280, depth: int = 5, reads_tokens: bool = False, target: str = ""):
        super().__init__()
        self.embedding_norm = RMSNorm(dim) if reads_tokens else None
        self.inner = nn.ModuleList(Linear(dim * (2 + i if reads_tokens else 1), dim) for i in range(depth))
        self.outer = nn.ModuleList(Linear(dim, dim, bias=False) for _ in range(depth))
        for p in self.outer.parameters():
            nn.init.zeros_(p)

    @property
    def kind(self) -> str:
        return "hydra" if self.config.reads_tokens else "medusa"

    def forward(self, features: Tensor, path: list[Tensor]) -> Tensor:
        """What the target's output head reads, [B, M, dim], for the token behind the last of `path`.

        `features` [B, M, dim] are the normed ones before the root; `path` the embeddings, [B, M, dim] each, of the root
        and of the drafts behind it.
        """
        i = len(path) - 1
        x = [features]
        if self.embedding_norm is not None:
            x += [self.embedding_norm(e) for e in path]
        read = torch.cat(x, dim=-1).to(self.dtype)
        return features + self.outer[i](nn.functional.silu(self.inner[i](read)))
