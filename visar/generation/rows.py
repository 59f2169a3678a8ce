"""The rows of a call: conditions, image indices, and the noise that depends only on seed, prompt and index."""

from __future__ import annotations

import hashlib
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
    hashes = torch.tensor([key_of(k) for k in keys], device=device)
    rows: Sequence[Hashable] = keys
    if not isinstance(seed, int):
        if len(seed) != len(keys):
            raise VisarError(f"There are {len(seed)} seeds for {len(keys)} images; give one, or one for each.")
        rows = range(len(keys))
    return Noise(seed, torch.tensor(image_indices(rows, first), device=device), hashes)


def key_of(condition: Hashable) -> int:
    """64 bits, signed, that tell conditions apart: a hash of a prompt, and of class ids one that is never equal."""
    if isinstance(condition, int):
        # CRC-32 is one-to-one on the last four digits; the others are in the upper half.
        return condition // 10**4 << 32 | zlib.crc32(str(condition).encode())
    text = str(condition).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little", signed=True)


def image_indices(keys: Sequence[Hashable], first: Any) -> list[int]:
    """One index per key: `first`, `first` + 1, ... for each key, or `first` itself if it is a list.

    Raises `VisarError` for a wrong number of indices, and for indices out of range.
    """
    if is_list(first):
        out = [_index(i) for i in first]
        if len(out) != len(keys):
            raise VisarError(f"first_image is one number, or one for each of the {len(keys)} images, not {len(out)}.")
    else:
        start, following, out = _index(first), dict[Hashable, int](), list[int]()
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
