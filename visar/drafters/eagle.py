"""The EAGLE drafter: one decoder layer that predicts the target's next feature (Li et al. 2024, arXiv:2401.15077).

It reads a token's embedding beside the feature one step before it, and borrows the target's output head. The norms, the
aux layers and the training on its own predictions are those of EAGLE-3 (Li et al. 2025, arXiv:2503.01840).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from visar.engine.component import Component
from visar.engine.decoder import Attend
from visar.engine.layers import Linear, RMSNorm
from visar.families.llamagen.gpt import Block


class EagleHead(Component):
    """`fc` joins embedding and feature, both [B, W, dim]; one block of the target's kind follows.

    `aux_layers` are layers of the target whose outputs are fused with its last feature into the one that is read;
    `target` is the fingerprint of the model that it was trained for (`visar.drafters.fingerprint`). With `codes` it is
    as LANTERN's released ones are (`visar.drafters.published`): no norms but one, a token embedding of its own, and
    code 0 in the place of a caption.
    """

    kind = "eagle"

    def __init__(
        self,
        dim: int = 1280,
        num_heads: int = 20,
        ffn: int = 3584,
        aux_layers: Sequence[int] = (),
        target: str = "",
        codes: int = 0,
    ):
        super().__init__()
        self.fusion = Linear(dim * (1 + len(aux_layers)), dim, bias=False) if aux_layers else None
        self.embedding = nn.Embedding(codes, dim) if codes else None
        self.embedding_norm, self.feature_norm, self.norm = (nn.Identity() if codes else RMSNorm(dim) for _ in range(3))
        self.fc = Linear(2 * dim, dim)
        self.block = Block(dim, num_heads, ffn)
        if codes:
            self.block.attention_norm = nn.Identity()  # type: ignore[assignment]
            self.block.ffn_norm.eps = 1e-6

    @property
    def head_dim(self) -> int:
        return self.config.dim // self.config.num_heads

    def fuse(self, features: Tensor) -> Tensor:
        """What is read of the target's features [B, W, dim * (1 + aux_layers)]: [B, W, dim]."""
        return features if self.fusion is None else self.fusion(features.to(self.dtype))

    def forward(self, embeddings: Tensor, features: Tensor, table: Tensor, attend: Attend) -> Tensor:
        """Predicted features [B, W, dim]; `norm` of them goes into the target's head.

        `features`, fused or its own, are those one step before the embeddings, `table` the position rows of the
        embeddings' own slots.
        """
        x = self.fc(torch.cat([self.embedding_norm(embeddings), self.feature_norm(features)], dim=-1))
        return self.block(x, table, attend, 0)
