"""Training a KL autoencoder for continuous tokens: L1 + L2 reconstruction and the divergence of its posterior.

A perceptual term is there as in `visar.training.tokenizer`. The weight of the divergence is far above that of Rombach
et al. 2022 (arXiv:2112.10752): what is trained here feeds small models, which should not have to predict detail below
the noise that the decoder tolerates.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visar.errors import VisarError
from visar.families.mar.autoencoder import KLAutoencoder, downsample
from visar.training.data import ImageSet, spread, to_unit
from visar.training.loop import STATE, TrainConfig, check_parts, distributed, fit, step_seed
from visar.training.patches import enlarged
from visar.training.perceptual import Perceptual
from visar.training.variants import vary

# 4x downsampling: 64 px to 16x16 tokens of 16 numbers.
SMALL_KL: Mapping[str, Any] = MappingProxyType(dict(channels=(32, 48, 64), blocks=1, groups=16, attention=False))


class AutoencoderLoss(nn.Module):
    """The autoencoder with its training loss.

    `divergence` is the weight of nats per number of an image, `perceptual` that of the term of this name.
    """

    def __init__(self, vae: KLAutoencoder, divergence: float = 0.03, perceptual: float = 0.0):
        super().__init__()
        self.vae = vae
        self.divergence = divergence
        self.weight = perceptual
        self.perceptual = Perceptual() if perceptual else None

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Scalar loss for uint8 pixels [B, 3, H, W] and standard normals [B, d, h, w]."""
        x = to_unit(pixels)
        mean, log_variance = (t.float() for t in self.vae.encode(x))
        y = self.vae.decode(mean + (log_variance / 2).exp() * noise).float()
        nats = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)).mean() / x[0].numel()
        loss = F.l1_loss(y, x) + 2.0 * F.mse_loss(y, x) + self.divergence * nats
        return loss if self.perceptual is None else loss + self.weight * self.perceptual(y, x)


@torch.no_grad()
def psnr(vae: KLAutoencoder, pixels: Tensor, batch: int = 64) -> float:
    """Mean over images of the PSNR in dB of reconstructions from posterior samples, for uint8 pixels [n, 3, H, W]."""
    g = torch.Generator().manual_seed(0)
    values = []
    for part in pixels.split(batch):
        x = to_unit(part.to(vae.device))
        mean, log_variance = vae.encode(x)
        z = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=g).to(x.device)
        values.append(10 * torch.log10(4.0 / (x - vae.decode(z).clamp(-1, 1)).square().mean((1, 2, 3))))
    return torch.cat(values).mean().item()


@torch.no_grad()
def encode(vae: KLAutoencoder, pixels: Tensor, batch: int = 64) -> tuple[Tensor, Tensor]:
    """Means and standard deviations, both [n, d, h, w], of the posteriors of uint8 pixels [n, 3, H, W]."""
    found = [vae.encode(to_unit(part.to(vae.device))) for part in pixels.split(batch)]
    mean, log_variance = (torch.cat([part.cpu() for part in parts]) for parts in zip(*found, strict=True))
    return mean, (log_variance / 2).exp()


def train_autoencoder(
    data: ImageSet,
    size: int,
    config: TrainConfig,
    sizes: Mapping[str, Any] = SMALL_KL,
    start: KLAutoencoder | None = None,
    perceptual: float = 0.0,
    varied: bool = False,
    decoder_only: bool = False,
) -> KLAutoencoder:
    """Train on the `train` split at `size` pixels; saves `vae/` in `config.out`; returns the EMA.

    Its `scaling_factor` is set so that latents of the training images have unit variance. `start` is one of these sizes
    to go on from, or one that reads smaller blocks. `perceptual` is the weight of that term; `varied` images are
    zoomed, shifted and recoloured (`visar.training.variants`), not only flipped. With `decoder_only` latents stay what
    they are under `start`, and so does the layer that reads them, by which a MAR knows its autoencoder.
    """
    if decoder_only and start is None:
        raise VisarError("A decoder alone is trained for an autoencoder that is there: give one to start from.")
    vae = _started(start, sizes)
    if size % downsample(vae):
        raise VisarError(f"The size must be a multiple of {downsample(vae)} pixels, not {size}.")
    check_parts(config.out, STATE, "vae")
    torch.manual_seed(config.seed)
    pixels = data.pixels(size)
    train = pixels[data.indices("train")]
    held = pixels[(data.indices("unseen-concept") or data.indices("train"))[:256]]
    some = spread(list(range(len(train))), 512)  # which give the scale of the latents
    side = size // downsample(vae)
    if decoder_only:
        for part in (vae.encoder, vae.quant_conv, vae.post_quant_conv, vae.decoder.conv_in):
            part.requires_grad_(False)

    def batch_at(step: int, rank: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(step_seed(config.seed, step, rank))
        part = train[torch.randint(len(train), (config.batch,), generator=g)]
        if varied:
            part = vary(part, torch.rand(len(part), 7, generator=g))
        elif torch.rand((), generator=g) < 0.5:
            part = part.flip(-1)
        return part, torch.randn(config.batch, vae.config.latent_channels, side, side, generator=g)

    def evaluate(ema: AutoencoderLoss) -> dict[str, float]:
        if distributed()[0] == 0:
            if not decoder_only:
                ema.vae.config = ema.vae.config.replace(scaling_factor=_scaling(ema.vae, train[some]))
            ema.vae.save_pretrained(config.out / "vae")  # complete at every moment
        mean, std = encode(ema.vae, held)
        nats = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).sum((1, 2, 3)).mean()
        return {"psnr_held_out": round(psnr(ema.vae, held), 2), "nats_per_image": round(nats.item(), 1)}

    return fit(AutoencoderLoss(vae, perceptual=perceptual), batch_at, config, evaluate).vae


def _scaling(vae: KLAutoencoder, pixels: Tensor) -> float:
    """What gives latents of these images unit variance."""
    mean, std = encode(vae, pixels)
    return round((mean.var() + std.square().mean()).rsqrt().item(), 4)


def _started(start: KLAutoencoder | None, sizes: Mapping[str, Any]) -> KLAutoencoder:
    made = KLAutoencoder(**sizes)
    if start is None:
        return made
    patch, left = divmod(made.config.patch, start.config.patch)
    if left or _structure(made) != _structure(start):
        raise VisarError(f"An autoencoder of {dict(made.config)} cannot go on from one of {dict(start.config)}.")
    made.load_state_dict(enlarged(start.float().state_dict(), start.config.patch, patch))
    made.config = made.config.replace(scaling_factor=start.config.scaling_factor)
    return made


def _structure(vae: KLAutoencoder) -> dict[str, Any]:
    """All sizes but those of pixels."""
    return {**vae.config, "channels": tuple(vae.config.channels), "patch": 1, "scaling_factor": 1.0}
