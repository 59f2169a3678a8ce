"""What tells the rows of a call apart: keys of prompts and classes, and image indices."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
import torch

from visar.engine.rng import Purpose
from visar.errors import VisarError
from visar.generation.rows import image_indices, key_of, noise_of

CPU = torch.device("cpu")


def test_prompts_of_one_checksum_have_noise_of_their_own() -> None:
    pair = ("plumless", "buckeroo")
    assert zlib.crc32(pair[0].encode()) == zlib.crc32(pair[1].encode())
    one, other = noise_of(pair, 0, 3, CPU).uniforms(Purpose.STEP, torch.arange(64).expand(2, -1), 0)[0]
    assert not (one == other).any()


def test_no_two_conditions_have_one_key() -> None:
    prompts = [f"a {colour} heart {i}" for colour in ("red", "blue") for i in range(50_000)]
    odd = ["", " ", "a", "A", "a ", "é", "e\u0301", "\ud800", "\U0001f600", "0", "1"]
    keys = [key_of(p) for p in prompts + odd]
    assert len(set(keys)) == len(keys) and all(-(2**63) <= k < 2**63 for k in keys)
    assert len({k & 0xFFFFFFFF for k in keys}) > 0.999 * len(keys)  # both halves are used
    assert len({k >> 32 for k in keys}) > 0.999 * len(keys)
    classes = [key_of(c) for c in (*range(25_000), 10**6, 10**9)]
    assert len(set(classes)) == len(classes)
    assert classes[:1000] == [zlib.crc32(str(c).encode()) for c in range(1000)]  # the images of a seed stay


def test_image_indices() -> None:
    keys = ["a", "b", "a"]
    assert image_indices(keys, 4) == [4, 4, 5]
    for one in (np.int64(4), torch.tensor(4), 4.0):
        assert image_indices(keys, one) == [4, 4, 5]  # type: ignore[arg-type]
    for each in ((4, 4, 5), np.array([4, 4, 5]), torch.tensor([4, 4, 5])):
        assert image_indices(keys, each) == [4, 4, 5]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (-1, "Image indices of one prompt go from 0 to 16777215"),
        (2**24 - 1, "Image indices of one prompt go from 0 to 16777215"),  # of the second "a"
        ([0, 0, 2**24], "Image indices of one prompt"),
        ([0, 1], "one for each of the 3 images, not 2"),
        (True, "first_image must be a whole number, not True"),
        ([0, 1.5, 2], "first_image must be a whole number, not 1.5"),
        ([0, True, 2], "first_image must be a whole number, not True"),
        (float("nan"), "first_image must be a whole number, not nan"),
        ("12", "first_image must be a whole number, not '12'"),
        (None, "first_image must be a whole number, not None"),
    ],
)
def test_bad_image_indices(first: Any, message: str) -> None:
    with pytest.raises(VisarError, match=message):
        image_indices(["a", "b", "a"], first)
