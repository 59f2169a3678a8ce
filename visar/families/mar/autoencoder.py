"""The KL autoencoder of MAR (KL-16 of Rombach et al. 2022, arXiv:2112.10752) as diffusers' `AutoencoderKL`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor


@dataclass(frozen=True)
class KLSizes:
    """Sizes of an autoencoder; the defaults are KL-16's: 16 pixels per latent, attention in the encoder's last level.

    `scale` is what latents are multiplied by to have about unit variance.
    """

    channels: tuple[int, ...] = (128, 128, 256, 256, 512)
    blocks: int = 2
    latent_channels: int = 16
    groups: int = 32
    attention: bool = True
    scale: float = 0.2325


def build(sizes: KLSizes, pixels: int = 256) -> AutoencoderKL:
    """An autoencoder of these sizes with random weights; `pixels` is only noted in its configuration."""
    levels = len(sizes.channels)
    down = ["DownEncoderBlock2D"] * levels
    if sizes.attention:
        down[-1] = "AttnDownEncoderBlock2D"
    return AutoencoderKL(
        down_block_types=tuple(down), up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=sizes.channels, layers_per_block=sizes.blocks, latent_channels=sizes.latent_channels,
        norm_num_groups=sizes.groups, sample_size=pixels, scaling_factor=sizes.scale,
    )  # fmt: skip


def fingerprint(vae: AutoencoderKL) -> str:
    """A mark of its weights that is the same in every dtype: a hash of the signs of what reads the latents."""
    signs = torch.signbit(vae.decoder.conv_in.weight.detach()).cpu().numpy()
    return hashlib.sha256(signs.tobytes()).hexdigest()[:16]


def downsample(vae: AutoencoderKL) -> int:
    """Pixels per latent along one side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def to_tokens(latents: Tensor) -> Tensor:
    """Tokens [B, h*w, d] in raster order of latents [B, d, h, w]."""
    return latents.flatten(2).transpose(1, 2)


def to_latents(tokens: Tensor, height: int) -> Tensor:
    """Latents [B, d, h, w] of tokens [B, h*w, d] in raster order."""
    return tokens.transpose(1, 2).unflatten(2, (height, -1))
