"""The convolutional encoder and decoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752), which autoencoders
of several families share. Names of modules are those of LlamaGen's published tokenizers."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def _norm(groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    def __init__(self, width_in: int, width: int, groups: int):
        super().__init__()
        self.norm1 = _norm(groups, width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = _norm(groups, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all cells of the map."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = _norm(groups, width)
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

    def __init__(self, width_in: int, width: int, blocks: int, groups: int, attention: bool, resample: str = ""):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(width_in if i == 0 else width, width, groups) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(width, groups) for _ in range(blocks if attention else 0))
        if resample:
            self.add_module(resample, Downsample(width) if resample == "downsample" else Upsample(width))
        self._resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return getattr(self, self._resample)(x) if self._resample else x


def _middle(width: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList([ResBlock(width, width, groups), AttnBlock(width, groups), ResBlock(width, width, groups)])


class Encoder(nn.Module):
    """Images [B, 3, H, W] to maps [B, outputs, h, w]; one level for each of `widths`, the largest map first.

    `channels` is the width before the first level; with `attention` the last level has it after every residual block.
    Blocks of `patch` x `patch` pixels enter as channels.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        blocks: int,
        outputs: int,
        groups: int = 32,
        attention: bool = True,
        patch: int = 1,
    ):
        super().__init__()
        self.patch = patch
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3 * patch**2, channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(before, width, blocks, groups, attention and i == last, "downsample" if i < last else "")
            for i, (before, width) in enumerate(zip((channels, *widths), widths, strict=False))
        )
        self.mid = _middle(widths[-1], groups)
        self.norm_out = _norm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(F.pixel_unshuffle(x, self.patch))
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Maps [B, inputs, h, w] to images; mirrors the encoder of the same `widths`, with one more block in each level.

    `conv_blocks.0` is the smallest map; with `attention` it has it.
    """

    def __init__(
        self,
        widths: Sequence[int],
        blocks: int,
        inputs: int,
        groups: int = 32,
        attention: bool = True,
        patch: int = 1,
    ):
        super().__init__()
        self.patch = patch
        widths, last = widths[::-1], len(widths) - 1
        self.conv_in = nn.Conv2d(inputs, widths[0], 3, padding=1)
        self.mid = _middle(widths[0], groups)
        self.conv_blocks = nn.ModuleList(
            Level(before, width, blocks + 1, groups, attention and i == 0, "upsample" if i < last else "")
            for i, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.norm_out = _norm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3 * patch**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.conv_in(z)
        for block in (*self.mid, *self.conv_blocks):
            z = block(z)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(z))), self.patch)
