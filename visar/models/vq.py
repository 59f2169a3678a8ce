"""The VQ image tokenizer of LlamaGen (Sun et al. 2024, arXiv:2406.06525), ds16 and ds8, with its published keys.

A convolutional encoder and decoder around a codebook of L2-normalised vectors. `VQConfig.infer` reads every size from
the shapes of a state dict, so the published files and the small tokenizer of `icons` load through the same code.

One size is not LlamaGen's: with `patch` above 1 the first convolution reads, and the last one writes, blocks of pixels
as channels (pixel shuffle, Shi et al. 2016, arXiv:1609.05158), which saves the costly levels at full resolution. And
with a `background` code, cells with nothing but white around them all get that code: norms and attention look at the
whole image, so that an encoder spends dozens of codes on white, and a GPT its capacity on telling them apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn


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
        levels = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.conv_blocks."))
        blocks = 1 + max(int(k.split(".")[4]) for k in state if k.startswith("encoder.conv_blocks.0.res."))
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


PAPER = 250 / 127.5 - 1  # at least so bright in all colours is background
MARGIN = 4  # pixels around a cell that must be background, too


def white_cells(pixels: Tensor, cell: int) -> Tensor:
    """Which cells of `cell` pixels are background, bool [B, h*w], for pixels [B, 3, H, W] in [-1, 1]."""
    ink = (pixels.amin(1, keepdim=True) < PAPER).float()
    near = F.max_pool2d(ink, 2 * MARGIN + 1, stride=1, padding=MARGIN)
    return (F.max_pool2d(near, cell) == 0).flatten(1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.norm1 = _norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = _norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all cells of the map."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        h = self.norm(x)
        q, k, v = (rearrange(f(h), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=height))


class Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # the reference pads right and bottom only


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks, attention where there is any, then a change of resolution."""

    def __init__(self, width_in: int, width: int, blocks: int, attention: bool, resample: type[nn.Module] | None):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(width_in if i == 0 else width, width) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(width) for _ in range(blocks if attention else 0))
        if resample is not None:
            self.add_module("downsample" if resample is Downsample else "upsample", resample(width))
        self._resample = "" if resample is None else ("downsample" if resample is Downsample else "upsample")

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return getattr(self, self._resample)(x) if self._resample else x


def _middle(width: int) -> nn.ModuleList:
    return nn.ModuleList([ResBlock(width, width), AttnBlock(width), ResBlock(width, width)])


class Encoder(nn.Module):
    def __init__(self, c: VQConfig):
        super().__init__()
        widths = [c.channels * m for m in c.channel_multipliers]
        last = len(widths) - 1
        self.patch = c.patch
        self.conv_in = nn.Conv2d(3 * c.patch**2, c.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(
                widths[i - 1] if i else c.channels, widths[i], c.res_blocks, i == last, Downsample if i < last else None
            )
            for i in range(len(widths))
        )
        self.mid = _middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], c.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(F.pixel_unshuffle(x, self.patch))
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Mirror of the encoder; `conv_blocks.0` is the lowest resolution."""

    def __init__(self, c: VQConfig):
        super().__init__()
        widths = [c.channels * m for m in reversed(c.channel_multipliers)]
        last = len(widths) - 1
        self.patch = c.patch
        self.conv_in = nn.Conv2d(c.z_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0])
        self.conv_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], widths[i], c.res_blocks + 1, i == 0, Upsample if i < last else None)
            for i in range(len(widths))
        )
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3 * c.patch**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.conv_in(z)
        for block in (*self.mid, *self.conv_blocks):
            z = block(z)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(z))), self.patch)


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


class VQModel(ModelMixin, ConfigMixin):
    """LlamaGen's VQ tokenizer: pictures in [-1, 1] to ids in raster order and back."""

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 16384,
        code_dim: int = 8,
        channels: int = 128,
        channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        res_blocks: int = 2,
        z_channels: int = 256,
        patch: int = 1,
        background: int = -1,
    ):
        super().__init__()
        c = VQConfig(
            codebook_size, code_dim, channels, tuple(channel_multipliers), res_blocks, z_channels, patch, background
        )
        self.sizes = c
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
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
