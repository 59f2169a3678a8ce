"""The diffusion head of MAR (Li et al. 2024, arXiv:2406.11838): a small MLP, and its noise schedule.

The schedule is the cosine one of Nichol & Dhariwal 2021 (arXiv:2102.09672), 1000 steps, respaced to fewer. Tables are
computed in float64. Keys are as published.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from visar.engine.layers import Linear
from visar.errors import VisarError

TRAINING_STEPS = 1000


def alphas_bar() -> Tensor:
    """The share of signal left at each of the 1000 steps, float64 [1000]; 2.4e-9 at the last one."""

    def signal(at: float) -> float:
        return math.cos((at + 0.008) / 1.008 * math.pi / 2) ** 2

    n = TRAINING_STEPS
    betas = [min(1 - signal((i + 1) / n) / signal(i / n), 0.999) for i in range(n)]
    return torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0)


class Schedule:
    """The tables of `steps` denoising steps, float64, in the order of sampling: entry 0 is the noisiest.

    `times` are the training steps that the network gets; those above `latest` are moved to it and equal ones
    merged, so there may be fewer than asked for (DiSA, Zhao et al. 2025, arXiv:2505.20297, needs it: at step 999 the
    error of the network is multiplied by 20,000 to give the clean token). `steps` is the number that is left.

    A step goes from x to N(from_clean * clean + from_noisy * x, std**2), where `clean` = x / root - eps * spread is
    the clean token, and log std**2 is between `log_least` (of the posterior) and `log_most` (beta), by the network's
    second output.
    """

    def __init__(self, steps: int = 100, latest: int | None = None):
        if not 2 <= steps <= TRAINING_STEPS:
            raise VisarError(f"The diffusion head takes 2 to {TRAINING_STEPS} steps, not {steps}.")
        # Accumulated as in the reference, so that ties between two training steps are rounded as there.
        strides = itertools.repeat((TRAINING_STEPS - 1) / (steps - 1), steps - 1)
        spaced = torch.tensor([round(at) for at in itertools.accumulate(strides, initial=0.0)])
        rising = spaced.clamp(max=TRAINING_STEPS - 1 if latest is None else latest).unique()
        bar = alphas_bar()[rising]
        before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
        beta = 1 - bar / before
        posterior = beta * (1 - before) / (1 - bar)
        posterior = torch.cat([posterior[1:2], posterior[1:]])  # the last step's is 0; its log is not used
        self.steps = len(rising)
        self.times = rising.flip(0)
        self.root = bar.sqrt().flip(0)
        self.spread = (1 / bar - 1).sqrt().flip(0)
        self.from_clean = (beta * before.sqrt() / (1 - bar)).flip(0)
        self.from_noisy = ((1 - before) * (1 - beta).sqrt() / (1 - bar)).flip(0)
        self.log_least = posterior.log().flip(0)
        self.log_most = beta.log().flip(0)


class TimeEmbedding(nn.Module):
    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(Linear(frequencies, width), nn.SiLU(), Linear(width, width))
        self.frequencies = frequencies

    def forward(self, times: Tensor) -> Tensor:
        half = self.frequencies // 2
        rates = torch.exp(-math.log(10000) * torch.arange(half, device=times.device, dtype=torch.float32) / half)
        angles = times[:, None].float() * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(next(self.mlp.parameters()).dtype))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class ResBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 3 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(modulate(self.in_ln(x), shift, scale))


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))
        self.linear = Linear(width, out)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class HeadNet(nn.Module):
    """Noise and the interpolation of the variance for noisy tokens, given vectors of the transformer."""

    def __init__(self, dim: int, condition: int, width: int, depth: int):
        super().__init__()
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = Linear(condition, width)
        self.input_proj = Linear(dim, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * dim)

    def forward(self, x: Tensor, times: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Noise and the variance's interpolation, [R, dim] each, for x [R, dim], training steps [R] and z [R, C]."""
        return self.at(x, self.time_embed(times), z)

    def at(self, x: Tensor, time: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` with the steps' embeddings [R, width], computed before."""
        h = self.input_proj(x)
        y = time + self.cond_embed(z)
        for block in self.res_blocks:
            h = block(h, y)
        noise, interpolation = self.final_layer(h, y).chunk(2, dim=-1)
        return noise, interpolation


class DiffusionHead(nn.Module):
    """Holds the net under the published name."""

    def __init__(self, dim: int, condition: int, width: int, depth: int):
        super().__init__()
        self.net = HeadNet(dim, condition, width, depth)


def interpolated_log_variance(schedule: Schedule, at: Tensor, interpolation: Tensor) -> Tensor:
    """Log variance of the steps `at` [R], for `interpolation` [R, dim]: -1 is the posterior's, 1 is beta's."""
    least, most = (t.to(interpolation)[at][:, None] for t in (schedule.log_least, schedule.log_most))
    share = (interpolation + 1) / 2
    return share * most + (1 - share) * least
