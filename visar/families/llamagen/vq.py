"""The VQ image tokenizer of LlamaGen (Sun et al. 2024, arXiv:2406.06525), ds16 and ds8, with its published keys.

A convolutional encoder and decoder around a codebook of L2-normalised vectors. `VQConfig.infer` reads every size from
the shapes of a state dict, so the published files and the small tokenizer of `icons` load through the same code.

One size is not LlamaGen's: with `patch` above 1 the first convolution reads, and the last one writes, blocks of pixels
as channels (pixel shuffle, Shi et al. 2016, arXiv:1609.05158), which saves the costly levels at full resolution. And
with a `background` code, cells with nothing but white around them all get that code: norms and attention look at the
whole image, so an encoder spends dozens of codes on white, and a GPT its capacity on telling them apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from annotated_types import Interval, Len
from einops import rearrange
from torch import Tensor, nn

from visar.engine.component import Component
from visar.errors import VisarError
from visar.families.blocks import Decoder, Encoder
from visar.families.weights import count
from visar.reading import Count, Size


@dataclass(frozen=True)
class VQConfig:
    """Sizes of a tokenizer; the defaults are LlamaGen's ds16."""

    codebook_size: int = 16384
    code_dim: int = 8
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    z_channels: int = 256
    patch: int = 1
    background: int = -1  # no such code

    @property
    def downsample(self) -> int:
        """Pixels per token along one side."""
        return self.patch * 2 ** (len(self.channel_multipliers) - 1)

    @staticmethod
    def infer(state: Mapping[str, Tensor]) -> VQConfig:
        """Read the sizes from the shapes of a tokenizer's state dict."""
        codebook_size, code_dim = state["quantize.embedding.weight"].shape
        channels, inputs = state["encoder.conv_in.weight"].shape[:2]
        levels = count(state, "encoder.conv_blocks.")
        blocks = count(state, "encoder.conv_blocks.0.res.")
        widths = [state[f"encoder.conv_blocks.{i}.res.0.conv1.weight"].shape[0] for i in range(levels)]
        return VQConfig(
            codebook_size=codebook_size,
            code_dim=code_dim,
            channels=channels,
            channel_multipliers=tuple(w // channels for w in widths),
            res_blocks=blocks,
            z_channels=state["quant_conv.weight"].shape[1],
            patch=math.isqrt(inputs // 3),
        )


WHITE = 250 / 127.5 - 1  # at least so bright in all colours is background
MARGIN = 4  # pixels around a cell that must be background, too


def white_cells(pixels: Tensor, cell: int) -> Tensor:
    """Which cells of `cell` pixels are background, bool [B, h*w], for pixels [B, 3, H, W] in [-1, 1]."""
    ink = (pixels.amin(1, keepdim=True) < WHITE).float()
    near = F.max_pool2d(ink, 2 * MARGIN + 1, stride=1, padding=MARGIN)
    return (F.max_pool2d(near, cell) == 0).flatten(1)


class Codebook(nn.Module):
    """Codes on the unit sphere. The stored rows are not unit length: they are normalised at every use."""

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(size, dim)

    @property
    def codes(self) -> Tensor:
        """The normalised rows, [codebook_size, code_dim]."""
        return F.normalize(self.embedding.weight, dim=-1)

    def nearest(self, z: Tensor) -> Tensor:
        """Ids [...] of the codes nearest to the unit vectors z [..., code_dim]."""
        return (z @ self.codes.T).argmax(-1)


class VQModel(Component):
    """LlamaGen's VQ tokenizer: images in [-1, 1] to ids in raster order and back."""

    passed_by = ("quantize", "quantize.embedding")
    own_dtype = ("encoder", "quant_conv")  # images are made without them

    def __init__(
        self,
        codebook_size: Size = 16384,
        code_dim: Size = 8,
        channels: Size = 128,
        channel_multipliers: Annotated[tuple[Size, ...], Len(1, 16)] = (1, 1, 2, 2, 4),
        res_blocks: Count = 2,
        z_channels: Size = 256,
        patch: Annotated[int, Interval(ge=1, le=64)] = 1,
        background: int = -1,
    ):
        super().__init__()
        if not -1 <= background < codebook_size:
            raise VisarError(f"The background is code {background}, and the codes are 0 to {codebook_size - 1}.")
        c = VQConfig(
            codebook_size, code_dim, channels, tuple(channel_multipliers), res_blocks, z_channels, patch, background
        )
        self.sizes = c
        widths = [channels * m for m in channel_multipliers]
        self.encoder = Encoder(channels, widths, res_blocks, z_channels, patch=patch)
        self.decoder = Decoder(widths, res_blocks, z_channels, patch=patch)
        self.quantize = Codebook(codebook_size, code_dim)
        self.quant_conv = nn.Conv2d(z_channels, code_dim, 1)
        self.post_quant_conv = nn.Conv2d(code_dim, z_channels, 1)

    def features(self, pixels: Tensor) -> Tensor:
        """Unit vectors [B, h, w, code_dim] before quantisation, for pixels [B, 3, H, W] in [-1, 1]."""
        return F.normalize(rearrange(self.quant_conv(self.encoder(pixels)), "b c h w -> b h w c"), dim=-1)

    def encode(self, pixels: Tensor) -> Tensor:
        """Ids [B, h*w] in raster order for pixels [B, 3, H, W] in [-1, 1]; H and W multiples of `downsample`."""
        return self.nearest(self.features(pixels), pixels).flatten(1)

    def nearest(self, features: Tensor, pixels: Tensor) -> Tensor:
        """Ids [B, h, w] of features [B, h, w, code_dim], with the background code where the pixels are background."""
        ids = self.quantize.nearest(features)
        if self.sizes.background < 0:
            return ids
        return ids.masked_fill(white_cells(pixels, self.sizes.downsample).view_as(ids), self.sizes.background)

    def decode_features(self, codes: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] for quantised unit vectors [B, h, w, code_dim]."""
        return self.decoder(self.post_quant_conv(rearrange(codes, "b h w c -> b c h w")))

    def decode(self, ids: Tensor, height: int | None = None) -> Tensor:
        """Pixels [B, 3, H, W], about [-1, 1], for ids [B, h*w]; the map is square unless `height` (cells) is given."""
        height = height or round(ids.shape[1] ** 0.5)
        codes = F.embedding(ids, self.quantize.codes)
        return self.decode_features(rearrange(codes, "b (h w) c -> b h w c", h=height))
