"""The rows of a call: their image indices, and the noise that depends only on prompt and index."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Hashable, Sequence
from typing import cast

import numpy as np
import torch

from visar.engine.rng import IMAGES, Noise
from visar.errors import VisarError
from visar.params import whole


def noise_of(keys: Sequence[Hashable], first: int | Sequence[int], seed: int, device: torch.device) -> Noise:
    """The noise of one row per key, a function of key and image index; `first` as in `image_indices`."""
    hashes = torch.tensor([key_of(k) for k in keys], device=device)
    return Noise(seed, torch.tensor(image_indices(keys, first), device=device), hashes)


def key_of(condition: Hashable) -> int:
    """64 bits, signed, that tell conditions apart: a hash of a prompt, and of class ids one that is never equal."""
    if isinstance(condition, int):
        # CRC-32 is one-to-one on the last four digits; the others are in the upper half.
        return condition // 10**4 << 32 | zlib.crc32(str(condition).encode())
    text = str(condition).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little", signed=True)


def image_indices(keys: Sequence[Hashable], first: int | Sequence[int]) -> list[int]:
    """One index per key: `first`, `first` + 1, ... for each key, or `first` itself if it is a sequence.

    Raises `VisarError` for a wrong number of indices, and for indices out of range.
    """
    if np.ndim(first):
        out = [_index(i) for i in cast(Sequence[int], first)]
        if len(out) != len(keys):
            raise VisarError(f"first_image is one number, or one for each of the {len(keys)} images, not {len(out)}.")
    else:
        start, following = _index(first), dict[Hashable, int]()
        out = []
        for key in keys:
            out.append(following.get(key, start))
            following[key] = out[-1] + 1
    if min(out) < 0 or max(out) >= IMAGES:
        raise VisarError(f"Image indices of one prompt go from 0 to {IMAGES - 1}.")
    return out


def _index(value: object) -> int:
    found = whole("first_image", value)
    if found is None:
        raise VisarError("first_image must be a whole number, not None.")
    return found
