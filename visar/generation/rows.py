"""The rows of a call: their image indices, and the noise that depends only on prompt and index."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Sequence

import torch

from visar.engine.rng import IMAGES, Noise
from visar.errors import VisarError


def noise_of(keys: Sequence[Hashable], first: int | Sequence[int], seed: int, device: torch.device) -> Noise:
    """The noise of one row per key, a function of key and image index; `first` as in `image_indices`."""
    hashes = torch.tensor([zlib.crc32(str(k).encode()) for k in keys], device=device)
    return Noise(seed, torch.tensor(image_indices(keys, first), device=device), hashes)


def image_indices(keys: Sequence[Hashable], first: int | Sequence[int]) -> list[int]:
    """One index per key: `first`, `first` + 1, ... for each key, or `first` itself if it is a sequence.

    Raises `VisarError` for a wrong number of indices, and for indices out of range.
    """
    if isinstance(first, int):
        following: dict[Hashable, int] = {}
        out = []
        for key in keys:
            out.append(following.get(key, first))
            following[key] = out[-1] + 1
    else:
        out = list(first)
        if len(out) != len(keys):
            raise VisarError(f"first_image is one number, or one for each of the {len(keys)} images, not {len(out)}.")
    if min(out) < 0 or max(out) >= IMAGES:
        raise VisarError(f"Image indices of one prompt go from 0 to {IMAGES - 1}.")
    return out
