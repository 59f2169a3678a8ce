"""The rows of a call: conditions, image indices, and the noise that depends only on seed, prompt and index."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from visar.engine.rng import IMAGES, Noise
from visar.errors import VisarError
from visar.params import is_list, whole


def listed(conditions: Any) -> list[Any]:
    """The prompts or classes of a call, which may be given as one, a list, an array or a tensor."""
    return list(conditions) if is_list(conditions) else [conditions]


def noise_of(
    keys: Sequence[Hashable], first: int | Sequence[int], seed: int | Sequence[int], device: torch.device
) -> Noise:
    """The noise of one row per key, a function of seed, key and image index; `first` as in `image_indices`.

    With a seed for each row, each row is the first of its key. Raises `VisarError` for a wrong number of seeds.
    """
    hashes = torch.tensor([zlib.crc32(str(k).encode()) for k in keys], device=device)
    rows: Sequence[Hashable] = keys
    if not isinstance(seed, int):
        if len(seed) != len(keys):
            raise VisarError(f"There are {len(seed)} seeds for {len(keys)} images; give one, or one for each.")
        rows = range(len(keys))
    return Noise(seed, torch.tensor(image_indices(rows, first), device=device), hashes)


def image_indices(keys: Sequence[Hashable], first: Any) -> list[int]:
    """One index per key: `first`, `first` + 1, ... for each key, or `first` itself if it is a list.

    Raises `VisarError` for a wrong number of indices, and for indices out of range.
    """
    if is_list(first):
        out = [whole("first_image", index) or 0 for index in first]
        if len(out) != len(keys):
            raise VisarError(f"first_image is one number, or one for each of the {len(keys)} images, not {len(out)}.")
    else:
        start, following, out = whole("first_image", first) or 0, dict[Hashable, int](), []
        for key in keys:
            out.append(following.get(key, start))
            following[key] = out[-1] + 1
    if min(out) < 0 or max(out) >= IMAGES:
        raise VisarError(f"Image indices of one prompt go from 0 to {IMAGES - 1}.")
    return out
