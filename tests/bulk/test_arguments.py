"""What bulk sampling takes from Python: numbers, paths and prompts of any kind, huge limits, samplers of users."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from visar.bulk import Condition, export_npz, read_classes, read_prompts, sample_images
from visar.errors import VisarError
from visar.pipelines import ClassToImagePipeline, TextToImagePipeline
from visar.reading import read_json
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
        ({"batch": 10**20}, "100000000000000000000 images at once need about"),
        ({"tokens": "yes"}, "tokens must be true or false, not 'yes'"),
    ],
)
def test_numbers_that_cannot_be(
    text_pipe: TextToImagePipeline, tmp_path: Path, bad: dict[str, Any], message: str
) -> None:
    with pytest.raises(VisarError, match=message):
        sample_images(text_pipe, PROMPTS, tmp_path / "own", **bad)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [None, 3, b"run", [], "", "a\0b"])
def test_paths_that_cannot_be(text_pipe: TextToImagePipeline, tmp_path: Path, bad: Any) -> None:
    sample_images(text_pipe, PROMPTS[:1], tmp_path / "run")
    for call in (
        lambda: sample_images(text_pipe, PROMPTS, bad),
        lambda: read_prompts(bad),
        lambda: export_npz(bad, tmp_path / "a.npz"),
        lambda: export_npz(tmp_path / "run", bad),
    ):
        with pytest.raises(VisarError, match="must be a path, not "):
            call()
    with pytest.raises(VisarError, match="Classes are given as 0-999 or 1,5,7-9, or as a file of these, not as "):
        read_classes(bad)


def test_names_of_files(text_pipe: TextToImagePipeline, tmp_path: Path) -> None:
    """Ends of names count in any case, and no other file is written than one that says what it is."""
    (tmp_path / "P.TXT").write_text("red cat\n")
    (tmp_path / "p.Jsonl").write_text('{"prompt": "red cat"}\n')
    assert read_prompts(tmp_path / "P.TXT") == read_prompts(tmp_path / "p.Jsonl")
    sample_images(text_pipe, PROMPTS[:1], tmp_path / "run")
    assert export_npz(tmp_path / "run", tmp_path / "a.NPZ") == 1
    for name in ("a", "a.zip"):
        with pytest.raises(VisarError, match=f"All images are written to a .npz file, not to .*{name}"):
            export_npz(tmp_path / "run", tmp_path / name)


def test_a_prompt_is_not_its_letters(
    text_pipe: TextToImagePipeline, class_pipe: ClassToImagePipeline, tmp_path: Path
) -> None:
    for i, prompts in enumerate(("red cat", (p for p in PROMPTS[:1]), np.array(PROMPTS[:1]), [Condition("red cat")])):
        assert sample_images(text_pipe, prompts, tmp_path / str(i)).images == 1  # type: ignore[arg-type]
        assert (tmp_path / str(i) / "000000.png").read_bytes() == (tmp_path / "0" / "000000.png").read_bytes()
    classes: Any = (3, np.int64(3), torch.tensor(3), np.array([3]), torch.tensor([3]))
    for i, labels in enumerate(classes):
        sample_images(class_pipe, labels, tmp_path / f"class-{i}")
        assert read_json(tmp_path / f"class-{i}" / "manifest.jsonl", dict)["class"] == 3
    for bad in (None, True, 3.5, {"red cat"}, b"red cat", [["red cat"]]):
        with pytest.raises(VisarError, match="Images are made of prompts or of class ids, not of "):
            sample_images(text_pipe, bad, tmp_path / "bad")  # type: ignore[arg-type]
    for about in ({"a": np.int64(1)}, {"a": float("nan")}, {"a": {1}}):
        with pytest.raises(VisarError, match="The metadata of a condition must be what JSON has"):
            sample_images(text_pipe, [Condition("red cat", None, about)], tmp_path / "bad")
    with pytest.raises(VisarError, match="The id of a condition is a text or a whole number, not true"):
        sample_images(text_pipe, [Condition("red cat", True)], tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


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
