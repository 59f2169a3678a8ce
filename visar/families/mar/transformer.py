"""MAR, the masked autoregressive model over continuous tokens (Li et al. 2024, arXiv:2406.11838), published keys.

The module has the weights and the arithmetic of a pass: an encoder over the known tokens, a decoder over all positions,
and the diffusion head that turns a position's vector into a token. The engine has guidance, denoising, and the set of
known tokens. Attention is bidirectional, so there is no KV cache.

The first `buffer` slots hold the class vector, repeated, or a caption's features.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor, nn
from typing_extensions import Self

from visar.engine.component import Component
from visar.engine.layers import Linear, check_heads
from visar.families.mar.diffusion import TRAINING_STEPS, DiffusionHead
from visar.reading import Count, Side, Size


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.training and x.device.type == "cpu" and mask is None:  # the fused backward takes twice as long
            weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1)
            return self.proj((weights @ v).transpose(1, 2).flatten(2))
        return self.proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = Linear(dim, 4 * dim)
        self.fc2 = Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """timm's vision transformer block, key for key; `mask` is of keys."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class MAR(Component):
    """Sizes are those of MAR-B by default; `condition` is "class" or "text", `buffer` the number of its slots.

    `vae` is the fingerprint of the autoencoder whose latents it was trained on, if known; `latest` the noisiest
    training step that its head should be used at.
    """

    passed_by = ("diffloss", "diffloss.net")
    own_dtype = ("diffloss",)

    def __init__(
        self,
        token_dim: Size = 16,
        grid: Side = 16,
        dim: Size = 768,
        encoder_layers: Count = 12,
        decoder_layers: Count = 12,
        num_heads: Size = 12,
        head_width: Size = 1024,
        head_layers: Count = 6,
        condition: Literal["class", "text"] = "class",
        classes: Size = 1000,
        buffer: Size = 64,
        caption_features: Size = 128,
        vae: str = "",
        latest: Annotated[int, Interval(ge=1, le=TRAINING_STEPS - 1)] = TRAINING_STEPS - 1,
    ):
        super().__init__()
        n = grid * grid
        if condition == "class":
            self.class_emb = nn.Embedding(classes, dim)
        else:
            self.caption_proj = Linear(caption_features, dim)
        self.fake_latent = nn.Parameter(torch.zeros(1, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, n + buffer, dim))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, n + buffer, dim))
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, n, dim))
        self.z_proj = Linear(token_dim, dim)
        self.z_proj_ln = nn.LayerNorm(dim, eps=1e-6)
        self.encoder_blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(encoder_layers))
        self.encoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_embed = Linear(dim, dim)
        self.decoder_blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(decoder_layers))
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.diffloss = DiffusionHead(token_dim, dim, head_width, head_layers)

    @property
    def length(self) -> int:
        """Tokens of an image."""
        return self.config.grid**2

    def to(self, *args: object, **kwargs: object) -> Self:
        """Move or convert. The diffusion head is moved only: its first steps multiply rounding errors by hundreds."""
        # A conversion to fewer bits and back would leave rounded weights in fp32.
        head = self._modules.pop("diffloss")
        try:
            super().to(*args, **kwargs)  # type: ignore[call-overload]
        finally:
            self._modules["diffloss"] = head
        self.diffloss.to(self.device)
        return self

    def slots(self, condition: Tensor) -> Tensor:
        """The first slots [B, buffer, dim] for classes [B], or for caption features [B, buffer, features]."""
        if self.config.condition == "class":
            return self.class_emb(condition)[:, None].expand(-1, self.config.buffer, -1)
        return self.caption_proj(condition.to(self.dtype))

    def null_slots(self, batch: int) -> Tensor:
        """The first slots [B, buffer, dim] without a condition."""
        return self.fake_latent[:, None].expand(batch, self.config.buffer, -1)

    def encode(self, tokens: Tensor, known: Tensor, slots: Tensor, valid: Tensor | None = None) -> Tensor:
        """The encoder's output [B, buffer + n, dim] for the slots and the known tokens.

        `tokens` [B, N, d]; `known` [B, n], long, are the positions of the known ones; for rows with fewer, `valid`
        [B, n] marks those that count.
        """
        b, m = len(tokens), self.config.buffer
        given = self.z_proj(tokens.gather(1, known[..., None].expand(-1, -1, tokens.shape[-1])).to(self.dtype))
        positions = self.encoder_pos_embed_learned[0]
        h = torch.cat([slots + positions[:m], given + positions[m:][known]], dim=1)
        h = self.z_proj_ln(h)
        mask = None
        if valid is not None:
            mask = torch.cat([valid.new_ones(b, m), valid], dim=1)[:, None, None]
        for block in self.encoder_blocks:
            h = block(h, mask)
        return self.encoder_norm(h)

    def decode(self, encoded: Tensor, known: Tensor, valid: Tensor | None = None) -> Tensor:
        """The vector of every position, [B, N, dim], for the head; meaningful at unknown positions only."""
        b, m, n = len(encoded), self.config.buffer, self.length
        h = self.decoder_embed(encoded)
        at = known if valid is None else torch.where(valid, known, n)  # invalid ones go to an extra position
        full = self.mask_token.to(h.dtype).expand(b, n + 1, -1)
        full = full.scatter(1, at[..., None].expand(-1, -1, h.shape[-1]), h[:, m:])[:, :n]
        h = torch.cat([h[:, :m], full], dim=1) + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            h = block(h)
        return self.decoder_norm(h[:, m:]) + self.diffusion_pos_embed_learned

    def forward(self, tokens: Tensor, known: Tensor, slots: Tensor, valid: Tensor | None = None) -> Tensor:
        """`decode` of `encode`."""
        return self.decode(self.encode(tokens, known, slots, valid), known, valid)
