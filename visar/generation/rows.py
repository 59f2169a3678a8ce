"""The rows of a call: which image of its prompt each is, and the noise that follows from that alone."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Sequence

import torch

from visar.engine.rng import IMAGES, Noise
from visar.errors import VisarError


def noise_of(keys: Sequence[Hashable], first: int | Sequence[int], seed: int, device: torch.device) -> Noise:
    """The noise of one row per key, which depends on key and image index alone; `first` as in `image_indices`."""
    hashes = torch.tensor([zlib.crc32(str(k).encode()) for k in keys], device=device)
    return Noise(seed, torch.tensor(image_indices(keys, first), device=device), hashes)


def image_indices(keys: Sequence[Hashable], first: int | Sequence[int]) -> list[int]:
    """One per key: `first`, `first` + 1, ... for each key by itself, or those of `first` if it says all of them."""
    if isinstance(first, int):
        seen: dict[Hashable, int] = {}
        out = []
        for key in keys:
            out.append(seen.get(key, first))
            seen[key] = out[-1] + 1
    else:
        out = list(first)
        if len(out) != len(keys):
            raise VisarError(f"first_image is one number, or one for each of the {len(keys)} images, not {len(out)}.")
    if min(out) < 0 or max(out) >= IMAGES:
        raise VisarError(f"Image indices of one prompt go from 0 to {IMAGES - 1}.")
    return out
