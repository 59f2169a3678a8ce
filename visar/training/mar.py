"""Training a text-conditional MAR on the latents of an autoencoder (Li et al. 2024, arXiv:2406.11838)."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visar.engine.memory import check_training
from visar.errors import VisarError
from visar.families.mar.autoencoder import KLAutoencoder, downsample, fingerprint, to_tokens
from visar.families.mar.diffusion import TRAINING_STEPS, Schedule, interpolated_log_variance
from visar.families.mar.transformer import MAR
from visar.text_encoders.words import WordEncoder
from visar.training.ar import encode_captions
from visar.training.autoencoder import encode
from visar.training.data import SPLITS, ImageSet, Record, spread
from visar.training.loop import STATE, TrainConfig, check_parts, distributed, fit, step_seed
from visar.training.phrases import typed
from visar.training.variants import mirrors, vary


class MARLoss(nn.Module):
    """The model with its loss: squared error of the noise, and the variational bound for the variance alone."""

    tables: Tensor

    def __init__(self, mar: MAR):
        super().__init__()
        self.mar = mar
        self.schedule = Schedule(TRAINING_STEPS)
        s = self.schedule
        share = (1 - s.root.square()).sqrt()
        moves = s.from_clean * s.spread  # the mean of a step, with the predicted noise
        self.register_buffer("tables", torch.stack([s.root, share, moves, s.log_least]).float(), persistent=False)

    def forward(
        self, tokens: Tensor, known: Tensor, hidden: Tensor, features: Tensor, drop: Tensor, time: Tensor, noise: Tensor
    ) -> Tensor:
        """Predict the tokens [B, N, d] at the places `hidden` [B, m] from those at `known` [B, N - m].

        `features` [B, M, C] are of captions, `drop` [B] marks rows trained without; `time` [B, m] counts steps in the
        order of sampling, `noise` [B, m, d].
        """
        slots = torch.where(drop[:, None, None], self.mar.null_slots(len(tokens)), self.mar.slots(features))
        z = self.mar(tokens, known, slots)

        def at(x: Tensor) -> Tensor:
            return x.gather(1, hidden[..., None].expand(-1, -1, x.shape[-1])).flatten(0, 1)

        return self.head_loss(at(tokens), at(z), time.flatten(), noise.flatten(0, 1))

    def head_loss(self, clean: Tensor, z: Tensor, time: Tensor, noise: Tensor) -> Tensor:
        """Scalar loss of the head for tokens and noise [R, d], their vectors [R, C] and steps [R] (0 the noisiest).

        The bound is the divergence of the step's Gaussian from the true posterior, and its mean is left out of the
        gradient (Nichol & Dhariwal 2021, arXiv:2102.09672). The last step has none: it takes its neighbour's variance.
        """
        root, share, moves, least = self.tables[:, time].unsqueeze(-1)
        times = self.schedule.times.to(time.device)[time]
        predicted, place = (t.float() for t in self.mar.diffloss.net(root * clean + share * noise, times, z))
        log_variance = interpolated_log_variance(self.schedule, time, place)
        wrong = (moves * (noise - predicted.detach())).square()
        bound = (log_variance - least + (least - log_variance).exp() + wrong * (-log_variance).exp() - 1) / 2
        return F.mse_loss(predicted, noise) + bound.mean()


def initialise(mar: MAR) -> MAR:
    """Xavier matrices, normal(0, 0.02) embeddings, and a head whose blocks start as the identity, as the paper's."""
    for name, p in mar.named_parameters():
        if "adaLN_modulation" in name or "final_layer.linear" in name:
            nn.init.zeros_(p)
        elif p.ndim < 2:
            nn.init.ones_(p) if "norm" in name or "_ln." in name else nn.init.zeros_(p)
            if name.endswith("bias"):
                nn.init.zeros_(p)
        elif p.ndim == 3 or "class_emb" in name or "fake_latent" in name or "time_embed" in name:
            nn.init.normal_(p, std=0.02)
        else:
            nn.init.xavier_uniform_(p)
    return mar


def masked_share(g: torch.Generator, least: float) -> float:
    """A share of tokens to hide, normally distributed with mean 1 and spread 0.25 cut to [`least`, 1]."""
    while True:
        share = 1 + 0.25 * torch.randn((), generator=g).item()
        if least <= share <= 1:
            return share


class LatentSamples:
    """What `MARLoss` is given: tokens of images, drawn anew from their posteriors, with a share hidden.

    For training, `varied` images are zoomed, shifted and recoloured (`visar.training.variants`), each time anew, and
    their prompts are as people type them.
    """

    def __init__(
        self,
        vae: KLAutoencoder,
        encoder: WordEncoder,
        data: ImageSet,
        size: int,
        least: float = 0.5,
        varied: bool = False,
    ):
        if size % downsample(vae):
            raise VisarError(f"The size must be a multiple of {downsample(vae)} pixels, not {size}.")
        self.vae, self.pixels = vae, data.pixels(size)
        self.encoder, self.records, self.least = encoder, data.records, least
        self.mirrored = torch.tensor([mirrors(r) for r in data.records]) if varied else None

    def __call__(
        self, rows: list[int], g: torch.Generator, rng: random.Random | None = None, dropped: float = 0.0
    ) -> tuple[Tensor, ...]:
        """The arguments of a step; with `rng` captions and images are varied; captions are left out at a rate."""
        pixels = self.pixels[rows].to(self.vae.device)
        if rng is not None and self.mirrored is not None:
            pixels = vary(pixels, torch.rand(len(rows), 7, generator=g), self.mirrored[rows])
        mean, std = (to_tokens(x) * self.vae.config.scaling_factor for x in encode(self.vae, pixels))
        say = Record.prompt if self.mirrored is None else typed
        features, _ = encode_captions(self.encoder, [self.records[i] for i in rows], rng, say)
        b, n, d = mean.shape
        tokens = mean + std * torch.randn(b, n, d, generator=g)
        hide = math.ceil(n * masked_share(g, self.least))
        order = torch.rand(b, n, generator=g).argsort(1)
        time = torch.randint(TRAINING_STEPS, (b, hide), generator=g)
        drop = torch.rand(b, generator=g) < dropped
        return tokens, order[:, hide:], order[:, :hide], features, drop, time, torch.randn(b, hide, d, generator=g)


@torch.no_grad()
def mean_loss(loss: MARLoss, samples: LatentSamples, rows: list[int], batch: int = 64) -> float:
    """The mean loss of these rows under their plain prompts, with noise that is always the same."""
    g, total = torch.Generator().manual_seed(1), 0.0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        total += loss(*(t.to(loss.tables.device) for t in samples(part, g))).item() * len(part)
    return total / len(rows)


def train_mar(
    data: ImageSet,
    size: int,
    config: TrainConfig,
    vae: KLAutoencoder,
    encoder: WordEncoder,
    dim: int = 128,
    layers: int = 6,
    heads: int = 2,
    head_width: int = 192,
    head_layers: int = 3,
    dropped: float = 0.1,
    latest: int = 950,
    varied: bool = False,
    weights: Mapping[str, float] | None = None,
    start: MAR | None = None,
) -> MAR:
    """Train on the `train` split; saves `mar/` (diffusers layout) and `text_encoder/` in `config.out`; returns the EMA.

    Encoder and decoder have `layers` each. Every step hides the same number of tokens in all its rows. The model is
    made to be used up to the head's training step `latest`: what comes after asks a precision that small heads lack.
    `varied` is that of `LatentSamples`, `weights` says how often images of a style or group are taken, 1 being normal,
    and `start` is a model of the same sizes to go on from.
    """
    check_parts(config.out, STATE, "mar", "text_encoder")
    torch.manual_seed(config.seed)
    shares = data.shares(weights or {})
    samples = LatentSamples(vae.to(distributed(config.device)[2]), encoder, data, size, varied=varied)
    split = {name: data.indices(name) for name in SPLITS}
    train = split["train"]
    reach = list(accumulate(shares[i] for i in train))
    made = partial(
        MAR, token_dim=vae.config.latent_channels, grid=size // downsample(vae), dim=dim, encoder_layers=layers,
        decoder_layers=layers, num_heads=heads, head_width=head_width, head_layers=head_layers, condition="text",
        buffer=encoder.length, caption_features=encoder.table.shape[1], vae=fingerprint(vae), latest=latest,
    )  # fmt: skip
    mar = initialise(check_training(made, config.device))
    if start is not None:
        ours, theirs = mar.config, start.config
        if wrong := [f"{name} {theirs[name]} instead of {ours[name]}" for name in ours if ours[name] != theirs[name]]:
            raise VisarError(f"The model to go on from is another one: {', '.join(wrong)}.")
        mar.load_state_dict(start.float().state_dict())
    taught = encoder.knowing(data.known())
    watched = {name: spread(rows, 128) for name, rows in split.items() if rows}

    def batch_at(step: int, rank: int) -> tuple[Tensor, ...]:
        seed = step_seed(config.seed, step, rank)
        rng = random.Random(seed)
        rows = rng.choices(train, cum_weights=reach, k=config.batch)
        return samples(rows, torch.Generator().manual_seed(seed), rng, dropped)

    def evaluate(ema: MARLoss) -> dict[str, float]:
        if distributed()[0] == 0:  # complete at every moment
            ema.mar.save_pretrained(config.out / "mar")
            taught.save_pretrained(config.out / "text_encoder")
        return {name: round(mean_loss(ema, samples, rows), 4) for name, rows in watched.items()}

    return fit(MARLoss(mar), batch_at, config, evaluate).mar
