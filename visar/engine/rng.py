"""Counter-based noise: a pure function of (seed, key, image, position, pass, purpose), not of the order of calls.

The same seed gives the same image whatever the batch, the rank or the restart. The noise is computed on the device
from a pass counter there, so a captured graph replays it with fresh values.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from visar.errors import VisarError
from visar.kernels import noise as made
from visar.kernels.noise import ExponentialNoise
from visar.params import is_list, whole

_MASK = 0xFFFFFFFF
SEEDS = 2**64
IMAGES = 2**24  # image indices
SPAN = made.SPAN  # positions, and passes


class Purpose(IntEnum):
    """The purpose of a random number. Numbers of different purposes are independent."""

    STEP = 1  # a pass at a position: the uniforms of a test and of a sample, or a draft that enters the window
    INIT = 2  # the drafts of the first window; the noise that a continuous token starts from
    SHARED = 3  # exponential noise that all drafts of a position share (Gumbel coupling); the noise of denoising steps
    DRAFT = 4  # the proposals of a draft model in a pass
    RESIDUAL = 5  # the replacement of a rejected continuous draft
    ORDER = 6  # the order in which a masked model samples its positions


def checked_seed(seed: int) -> int:
    """The seed. Raises `VisarError` unless it is a whole number of 64 bits, which no other seed has."""
    found = whole("The seed", seed)
    if found is None or not 0 <= found < SEEDS:
        raise VisarError(f"The seed must be from 0 to {SEEDS - 1}, not {seed}.")
    return found


def check_length(length: int, window: int = 0) -> None:
    """Raise `VisarError` for images of more tokens than there are positions, with windows that reach past the end."""
    if length + 2 * window > SPAN:
        raise VisarError(f"Images may have up to {SPAN - 2 * window} tokens here, not {length}.")


class Noise:
    """Noise for the rows of a batch.

    `seed` is from 0 to 2**64 - 1, or one for each row; `images` [B] are the rows' image indices, from 0 to 2**24 - 1;
    `keys` [B], of 64 bits, distinguish rows of the same index, such as those of different prompts. Positions and passes
    are below 2**16 (`check_length`). Nothing that is in these ranges shares its numbers with anything else that is; a
    `VisarError` for a seed or an index that is not.
    """

    def __init__(self, seed: int | Sequence[int], images: Tensor | Sequence[int], keys: Tensor | None = None):
        try:
            given = torch.as_tensor(images)
            self.images = given.long()
            if given.ndim != 1 or bool(((given != self.images) | (given < 0) | (given >= IMAGES)).any()):
                raise ValueError
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise VisarError(f"Image indices are whole numbers from 0 to {IMAGES - 1}.") from error
        every: list[Any] = list(seed) if is_list(seed) else [seed] * len(given)
        seeds = [checked_seed(one) for one in every]
        if len(seeds) != len(given):
            raise VisarError(f"There are {len(seeds)} seeds for {len(given)} rows; give one, or one for each.")
        self.key = torch.tensor([[s & _MASK, s >> 32 & _MASK] for s in seeds], device=self.images.device)
        self.keys = torch.zeros_like(self.images) if keys is None else keys.long()

    def uniforms(
        self, purpose: Purpose, positions: Tensor, passes: Tensor | int, trial: Tensor | int = 0
    ) -> tuple[Tensor, Tensor]:
        """Two independent uniforms per position, each [B, W], float64, of 52 bits, in (0, 1)."""
        return made.uniforms(self.key, self.images, self.keys, positions, passes, purpose, trial)

    def of(self, rows: Tensor) -> Noise:
        """The noise of the rows [R] as a batch."""
        own = copy.copy(self)
        own.images, own.keys, own.key = self.images[rows], self.keys[rows], self.key[rows]
        return own

    def normals(
        self, purpose: Purpose, positions: Tensor, passes: Tensor | int, dim: int, trial: Tensor | int = 0
    ) -> Tensor:
        """Standard normals [B, W, dim], fp32, for positions [B, W] (Box & Muller 1958), of 32 bits: at most 6.8.

        `trial`, a number or [W], gives further ones for the same position, pass and purpose.
        """
        if dim > 2**14:
            raise VisarError(f"Tokens have at most {2**14} numbers, not {dim}.")
        lanes = torch.arange((dim + 3) // 4, device=positions.device)
        lanes = lanes + (trial[..., None] if isinstance(trial, Tensor) else trial) * 2**12
        wide = positions[..., None].expand(*positions.shape, lanes.shape[-1])
        turns = passes[..., None] if isinstance(passes, Tensor) else passes
        words = made.words(self.key, self.images, self.keys, wide, turns, purpose, lanes)
        a, b, c, d = ((w.double() + 0.5) * 2.0**-32 for w in words)
        out = []
        for size, turn in ((a, b), (c, d)):
            radius, angle = (-2 * size.log()).sqrt(), 2 * math.pi * turn
            out += [radius * angle.cos(), radius * angle.sin()]
        return torch.stack(out, -1).flatten(-2)[..., :dim].float()

    def exponential(self, purpose: Purpose, positions: Tensor, passes: Tensor | int, vocab: int) -> Tensor:
        """Exp(1) variables [B, W, vocab], fp32, for positions [B, W]: argmin of E/p over tokens is a sample from p."""
        return self.lazy_exponential(purpose, positions, passes, vocab).make()

    def lazy_exponential(
        self, purpose: Purpose, positions: Tensor, passes: Tensor | int, vocab: int
    ) -> ExponentialNoise:
        """The variables of `exponential`, not yet computed: a kernel may compute them as it needs them."""
        return ExponentialNoise(self.key, self.images, self.keys, positions, passes, purpose, vocab)
