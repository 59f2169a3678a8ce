"""MAR and its schedule written again in the plainest way, from its paper and published code; for the tests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from visar.families.mar.transformer import MAR

TINY: dict[str, Any] = dict(
    token_dim=3, grid=3, dim=16, encoder_layers=2, decoder_layers=3, num_heads=2, head_width=24, head_layers=2,
    classes=5, buffer=4,
)  # fmt: skip
N = TINY["grid"] ** 2
Weights = Mapping[str, Tensor]


def random_weights(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, so that none of them is neutral, as norms are at first."""
    g = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.3, generator=g)
    return module.requires_grad_(False).eval()


def tiny(**sizes: Any) -> MAR:
    mar = MAR(**TINY | sizes)
    random_weights(mar)
    return mar


def drawn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def normed(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def norm(x: Tensor, w: Weights, name: str) -> Tensor:
    return normed(x) * w[f"{name}.weight"] + w[f"{name}.bias"]


def plain_block(x: Tensor, w: Weights, name: str, heads: int) -> Tensor:
    """A transformer block on one sequence [L, C], head by head."""
    size = x.shape[-1] // heads
    q, k, v = linear(norm(x, w, f"{name}.norm1"), w, f"{name}.attn.qkv").chunk(3, -1)
    out = []
    for part in (slice(i * size, (i + 1) * size) for i in range(heads)):
        out.append((q[:, part] @ k[:, part].T / math.sqrt(size)).softmax(-1) @ v[:, part])
    x = x + linear(torch.cat(out, -1), w, f"{name}.attn.proj")
    h = linear(norm(x, w, f"{name}.norm2"), w, f"{name}.mlp.fc1")
    return x + linear(h * 0.5 * (1 + torch.erf(h / math.sqrt(2))), w, f"{name}.mlp.fc2")


def plain_pass(w: Weights, tokens: Tensor, hidden: Tensor, slots: Tensor) -> Tensor:
    """The vectors [N, C] of one image: tokens [N, d], a mask of the hidden ones [N], what its slots hold [M, C]."""
    m, heads = len(slots), TINY["num_heads"]
    h = torch.cat([slots, linear(tokens, w, "z_proj")]) + w["encoder_pos_embed_learned"][0]
    kept = torch.cat([torch.ones(m, dtype=torch.bool), ~hidden])
    h = norm(h, w, "z_proj_ln")[kept]
    for i in range(TINY["encoder_layers"]):
        h = plain_block(h, w, f"encoder_blocks.{i}", heads)
    h = linear(norm(h, w, "encoder_norm"), w, "decoder_embed")
    full = w["mask_token"][0].repeat(len(kept), 1)
    full[kept] = h
    full = full + w["decoder_pos_embed_learned"][0]
    for i in range(TINY["decoder_layers"]):
        full = plain_block(full, w, f"decoder_blocks.{i}", heads)
    return norm(full, w, "decoder_norm")[m:] + w["diffusion_pos_embed_learned"][0]


def plain_times(steps: int, latest: int = 999) -> list[int]:
    """The training steps in rising order, added up as published code does."""
    at, out = 0.0, set()
    for _ in range(steps):
        out.add(min(round(at), latest))
        at += 999 / (steps - 1)
    return sorted(out)


def plain_bars() -> np.ndarray:
    """The cosine schedule in closed form; its last step alone is clipped."""
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    bars = f[1:] / f[0]
    bars[-1] = bars[-2] * (1 - 0.999)
    return bars


def plain_tables(steps: int, latest: int = 999) -> list[dict[str, float]]:
    """For each step, the noisiest first: what Bayes' rule says of the token before it.

    The token before is N(sqrt(before) clean, 1 - before), and x given it N(sqrt(alpha) it, beta); the posterior is
    their product, added up by precision.
    """
    out, before = [], 1.0
    for t in plain_times(steps, latest):
        bar = float(plain_bars()[t])
        alpha = bar / before
        beta = 1 - alpha
        if before == 1:
            mean, variance = (1.0, 0.0), 0.0
        else:
            precision = 1 / (1 - before) + alpha / beta
            mean = (math.sqrt(before) / (1 - before) / precision, math.sqrt(alpha) / beta / precision)
            variance = 1 / precision
        out.append({"time": t, "bar": bar, "clean": mean[0], "noisy": mean[1], "beta": beta, "posterior": variance})
        before = bar
    out[0]["posterior"] = out[1]["posterior"]  # its logarithm is asked for, so published code puts the next one there
    return out[::-1]
