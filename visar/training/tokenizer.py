"""Training a VQ tokenizer (LlamaGen's architecture): L1 + L2 reconstruction, codebook and commitment terms.

A perceptual term is there for those who have its network (`visar.training.perceptual`); there is no adversarial one.
"""

from __future__ import annotations

from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visar.errors import VisarError
from visar.families.llamagen.vq import VQConfig, VQModel
from visar.training.data import ImageSet, to_unit
from visar.training.loop import STATE, TrainConfig, check_parts, distributed, fit, step_seed
from visar.training.patches import enlarged
from visar.training.perceptual import Perceptual
from visar.training.variants import vary

# 4x downsampling: 64 px to 16x16 tokens.
SMALL_VQ = VQConfig(2048, 8, channels=32, channel_multipliers=(1, 2, 2), res_blocks=1, z_channels=64)


class TokenizerLoss(nn.Module):
    """The tokenizer with its training loss.

    `commitment` is the beta of van den Oord et al. 2017 (arXiv:1711.00937), `perceptual` the weight of that term.
    """

    last_used: Tensor
    clock: Tensor

    def __init__(self, vq: VQModel, commitment: float = 0.25, perceptual: float = 0.0):
        super().__init__()
        self.vq = vq
        self.weight = perceptual
        self.perceptual = Perceptual() if perceptual else None
        self.commitment = commitment
        self.register_buffer("last_used", torch.zeros(vq.sizes.codebook_size, dtype=torch.long), persistent=False)
        self.register_buffer("clock", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Scalar loss for uint8 pixels [B, 3, H, W]."""
        x = to_unit(pixels)
        z = self.vq.features(x).float()
        codes = self.vq.quantize.codes
        ids = self.vq.nearest(z.detach(), x)
        self.clock += 1
        self.last_used[ids.flatten()] = self.clock
        e = F.embedding(ids, codes)
        y = self.vq.decode_features(z + (e - z).detach()).float()
        reconstruction = F.l1_loss(y, x) + 2.0 * F.mse_loss(y, x)
        quantisation = F.mse_loss(e, z.detach()) + self.commitment * F.mse_loss(z, e.detach())
        loss = reconstruction + quantisation * self.vq.sizes.code_dim
        return loss if self.perceptual is None else loss + self.weight * self.perceptual(y, x)

    @torch.no_grad()
    def revive(self, pixels: Tensor, idle: int) -> None:
        """Move codes unused for `idle` steps onto features of these images."""
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        weight = self.vq.quantize.embedding.weight
        dead = (self.clock - self.last_used > idle).nonzero().flatten()
        if len(dead):
            z = self.vq.features(to_unit(pixels)).float().flatten(0, 2)
            weight[dead] = z[torch.randint(len(z), (len(dead),), device=z.device)].to(weight.dtype)
            self.last_used[dead] = self.clock
        if together:  # ranks saw different images and so other dead codes: rank 0's choice is everyone's
            torch.distributed.broadcast(weight.data, 0)
            torch.distributed.broadcast(self.last_used, 0)


@torch.no_grad()
def psnr(vq: VQModel, pixels: Tensor, batch: int = 64) -> float:
    """Mean over images of the PSNR in dB of reconstructions, for uint8 pixels [n, 3, H, W]."""
    device = next(vq.parameters()).device
    values = []
    for part in pixels.split(batch):
        x = to_unit(part.to(device))
        y = vq.decode(vq.encode(x), x.shape[2] // vq.sizes.downsample).clamp(-1, 1)
        values.append(10 * torch.log10(4.0 / (x - y).square().mean((1, 2, 3)).clamp_min(1e-10)))
    return torch.cat(values).mean().item()


def train_tokenizer(
    data: ImageSet,
    size: int,
    config: TrainConfig,
    sizes: VQConfig = SMALL_VQ,
    start: VQModel | None = None,
    perceptual: float = 0.0,
    varied: bool = False,
    decoder_only: bool = False,
) -> VQModel:
    """Train on the `train` split at `size` pixels; saves `vq/` in diffusers layout in `config.out`; returns the EMA.

    `start` is what to go on from, of the same sizes or, as far as pixels go, smaller ones. `perceptual` is the weight
    of that term. With `varied`, images are zoomed, shifted and recoloured (`visar.training.variants`), not only
    flipped. With `decoder_only`, tokens stay what they are under `start`: a GPT that was trained on them remains right.
    """
    if decoder_only and start is None:
        raise VisarError("A decoder alone is trained for a tokenizer that is there: give one to start from.")
    if size % sizes.downsample:
        raise VisarError(f"The size must be a multiple of {sizes.downsample} pixels, not {size}.")
    check_parts(config.out, STATE, "vq")
    torch.manual_seed(config.seed)
    pixels = data.pixels(size)
    train = pixels[data.indices("train")]
    held = pixels[(data.indices("unseen-concept") or data.indices("train"))[:256]]
    loss = TokenizerLoss(_started(start, sizes), perceptual=perceptual)
    if decoder_only:
        for part in (loss.vq.encoder, loss.vq.quant_conv, loss.vq.quantize):
            part.requires_grad_(False)

    def batch_at(step: int, rank: int) -> tuple[Tensor]:
        g = torch.Generator().manual_seed(step_seed(config.seed, step, rank))
        part = train[torch.randint(len(train), (config.batch,), generator=g)]
        if varied:
            return (vary(part, torch.rand(len(part), 7, generator=g)),)
        if torch.rand((), generator=g) < 0.5:
            part = part.flip(-1)
        return (part,)

    def after_step(module: TokenizerLoss, step: int) -> None:
        if not decoder_only and (step == 20 or (step % 100 == 0 and step < 2000)):
            module.revive(batch_at(step + 10**8, 0)[0].to(module.clock.device), idle=15 if step == 20 else 100)

    def evaluate(ema: TokenizerLoss) -> dict[str, float]:
        if distributed()[0] == 0:
            ema.vq.save_pretrained(config.out / "vq")  # complete at every moment
        ids = ema.vq.encode(to_unit(held.to(ema.clock.device)))
        return {"psnr_held_out": round(psnr(ema.vq, held), 2), "codes_used": ids.unique().numel()}

    return fit(loss, batch_at, config, evaluate, after_step).vq


def _started(start: VQModel | None, sizes: VQConfig) -> VQModel:
    if start is None:
        return VQModel(**asdict(sizes))
    patch, left = divmod(sizes.patch, start.sizes.patch)
    if left or replace(start.sizes, patch=sizes.patch, background=sizes.background) != sizes:
        raise VisarError(f"A tokenizer of {sizes} cannot go on from one of {start.sizes}.")
    made = VQModel(**asdict(sizes))
    made.load_state_dict(enlarged(start.state_dict(), start.sizes.patch, patch))
    return made
