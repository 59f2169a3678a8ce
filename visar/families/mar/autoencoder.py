"""The KL autoencoder of MAR (KL-16 of Rombach et al. 2022, arXiv:2112.10752); it reads folders of diffusers too."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Interval, Len
from torch import Tensor, nn
from typing_extensions import Self

from visar.engine.component import Component, fill, read_config, read_tensors, unfilled, weights_file
from visar.errors import VisarError
from visar.families.blocks import Decoder, Encoder
from visar.reading import Count, Positive, Size, parse_json

# Our names of modules, and those of latent diffusion and diffusers.
PUBLISHED = {"mid.0": "mid.block_1", "mid.1": "mid.attn_1", "mid.2": "mid.block_2", "res": "block"}
DIFFUSERS = {
    "mid.0": "mid_block.resnets.0",
    "mid.1": "mid_block.attentions.0",
    "mid.2": "mid_block.resnets.1",
    "encoder.conv_blocks": "encoder.down_blocks",
    "decoder.conv_blocks": "decoder.up_blocks",
    "res": "resnets",
    "attn": "attentions",
    "downsample": "downsamplers.0",
    "upsample": "upsamplers.0",
    "norm_out": "conv_norm_out",
    "nin_shortcut": "conv_shortcut",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}


@dataclass
class DiffusersConfig:
    """What is read of the configuration of an `AutoencoderKL`."""

    block_out_channels: Annotated[tuple[Size, ...], Len(1, 16)]
    layers_per_block: Count
    latent_channels: Size
    norm_num_groups: Size
    down_block_types: Annotated[tuple[str, ...], Len(1, 16)]
    scaling_factor: Positive
    shift_factor: float | None = None


class KLAutoencoder(Component):
    """Images in [-1, 1] to the normal distribution of their latents, and back; by default with the sizes of KL-16.

    `channels` has a width for each level; with `attention` the encoder's last level has attention; latents times
    `scaling_factor` have about unit variance. With `patch` above 1, which no published one has, the first convolution
    reads, and the last one writes, blocks of pixels.
    """

    own_dtype = ("encoder", "quant_conv")  # images are made without them

    def __init__(
        self,
        channels: Annotated[tuple[Size, ...], Len(1, 16)] = (128, 128, 256, 256, 512),
        blocks: Count = 2,
        latent_channels: Size = 16,
        groups: Size = 32,
        attention: bool = True,
        scaling_factor: Positive = 0.2325,
        patch: Annotated[int, Interval(ge=1, le=64)] = 1,
    ):
        super().__init__()
        self.encoder = Encoder(channels[0], channels, blocks, 2 * latent_channels, groups, attention, patch)
        self.decoder = Decoder(channels, blocks, latent_channels, groups, attention=False, patch=patch)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, [B, d, h, w] each, of the latents of pixels [B, 3, H, W] in [-1, 1]."""
        mean, log_variance = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, H, W], about [-1, 1], of latents [B, d, h, w]."""
        return self.decoder(self.post_quant_conv(latents))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """As `Component.from_pretrained`; also reads the folder of a diffusers `AutoencoderKL`."""
        named, config = read_config(folder)
        if named != "AutoencoderKL":
            return super().from_pretrained(folder)
        if (file := weights_file(folder)) is None:
            raise VisarError(f"There is no file of weights in {folder}.")
        return cls._of_diffusers(config, read_tensors(file), file)

    @classmethod
    def of(cls, vae: Any) -> Self:
        """`vae` itself, or one that shares the weights of a diffusers `AutoencoderKL`.

        Raises `VisarError` for an object of another kind, and for an autoencoder of another structure.
        """
        if isinstance(vae, cls):
            return vae
        if type(vae).__name__ != "AutoencoderKL":
            raise VisarError(
                f"vae must be a KLAutoencoder, or an AutoencoderKL of diffusers, not a {type(vae).__name__}."
            )
        return cls._of_diffusers(vae.config, vae.state_dict(), "the AutoencoderKL")

    @classmethod
    def _of_diffusers(cls, config: Mapping[str, Any], state: Mapping[str, Tensor], path: str | Path) -> Self:
        where = f"{path} has no configuration of an AutoencoderKL"
        c = parse_json(json.dumps(dict(config), default=str), DiffusersConfig, where)
        if c.shift_factor:
            raise VisarError(f"{path} shifts its latents (shift_factor), which is not supported.")
        attention = c.down_block_types[-1].startswith("Attn")
        try:
            with unfilled():
                made = cls(
                    c.block_out_channels, c.layers_per_block, c.latent_channels, c.norm_num_groups, attention,
                    c.scaling_factor,
                )  # fmt: skip
        except (ValueError, RuntimeError) as error:
            raise VisarError(f"{where}: {error}.") from error
        own = made.state_dict()
        names = {key: diffusers_name(key) for key in own}
        state = dict(state)
        for key, name in names.items():
            if own[key].shape[2:] == (1, 1) and name in state and state[name].ndim == 2:
                state[name] = state[name][:, :, None, None]  # a linear layer there, a 1 x 1 convolution here
        return fill(made, state, path, names).requires_grad_()


def published_name(key: str, levels: int) -> str:
    """The name of our tensor `key` in the authors' files, which count levels from the largest image on both sides."""
    key = key.replace("encoder.conv_blocks", "encoder.down")
    key = re.sub(r"decoder\.conv_blocks\.(\d+)", lambda found: f"decoder.up.{levels - 1 - int(found[1])}", key)
    return _renamed(key, PUBLISHED)


def diffusers_name(key: str) -> str:
    """The name of our tensor `key` in diffusers' `AutoencoderKL`."""
    return _renamed(key, DIFFUSERS)


def _renamed(key: str, names: Mapping[str, str]) -> str:
    for ours, theirs in names.items():
        key = re.sub(rf"(?<![^.]){re.escape(ours)}(?![^.])", theirs, key)
    return key


def fingerprint(vae: KLAutoencoder) -> str:
    """A hash of the signs of the layer that reads the latents, the same in every dtype."""
    signs = torch.signbit(vae.decoder.conv_in.weight.detach()).cpu().numpy()
    return hashlib.sha256(signs.tobytes()).hexdigest()[:16]


def downsample(vae: KLAutoencoder) -> int:
    """Pixels per latent along one side."""
    return int(vae.config.patch) * 2 ** (len(vae.config.channels) - 1)


def to_tokens(latents: Tensor) -> Tensor:
    """Tokens [B, h*w, d] in raster order of latents [B, d, h, w]."""
    return latents.flatten(2).transpose(1, 2)


def to_latents(tokens: Tensor, height: int) -> Tensor:
    """Latents [B, d, h, w] of tokens [B, h*w, d] in raster order."""
    return tokens.transpose(1, 2).unflatten(2, (height, -1))
