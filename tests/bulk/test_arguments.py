"""What `sample_images` takes from Python: numbers of any kind, limits of any size, samplers of users."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from visar.bulk import sample_images
from visar.errors import VisarError
from visar.pipelines import TextToImagePipeline
from visar.samplers import SpeculativeJacobi

PROMPTS = ("red cat", "blue dog", "city, flat")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"seed": None}, "seed must be a whole number, not None"),
        ({"seed": [1, 2]}, "seed must be a whole number"),
        ({"seed": -1}, "seed must be from 0 to"),
        ({"count": 1.5}, "count must be a whole number"),
        ({"count": True}, "count must be a whole number"),
        ({"batch": None}, "batch must be a whole number, not None"),
        ({"batch": 1.5}, "batch must be a whole number"),
    ],
)
def test_numbers_that_cannot_be(
    text_pipe: TextToImagePipeline, tmp_path: Path, bad: dict[str, Any], message: str
) -> None:
    with pytest.raises(VisarError, match=message):
        sample_images(text_pipe, PROMPTS, tmp_path / "own", **bad)
    assert not any(tmp_path.iterdir())


@dataclass(frozen=True)
class Own(SpeculativeJacobi):
    """A sampler of a user, with what JSON has not."""

    levels: tuple[int, ...] = (1, 2)
    rule: Any = print
    name: ClassVar[str] = "own"  # type: ignore[misc]


def test_numbers_of_numpy_huge_limits_and_samplers_of_users(text_pipe: TextToImagePipeline, tmp_path: Path) -> None:
    given: dict[str, Any] = {"count": np.int64(3), "seed": np.int64(7), "top_k": 10**30, "sampler": Own()}
    assert sample_images(text_pipe, PROMPTS, tmp_path / "own", **given).sampled == 3
    (tmp_path / "own" / "000001.png").unlink()
    assert sample_images(text_pipe, PROMPTS, tmp_path / "own", **given).sampled == 1
    sample_images(text_pipe, PROMPTS, tmp_path / "all", count=3, seed=7, top_k=0, sampler=SpeculativeJacobi())
    for name in ("000000.png", "000001.png", "000002.png"):
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "all" / name).read_bytes()
