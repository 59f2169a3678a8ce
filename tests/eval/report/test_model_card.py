"""The figures and contact sheets of a model's card."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.tiny import image_folder
from visar import TextToImagePipeline
from visar.eval.report.model_card import main, recognition
from visar.training.data import ImageSet, to_unit


def test_what_is_nearest(text_pipe: TextToImagePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that gives back training images copies all; one that gives those of another concept, none."""
    data = ImageSet(image_folder(tmp_path / "set", 60))
    pixels, train = to_unit(data.pixels(20)) / 2 + 0.5, data.indices("train")
    at = {data.records[i].prompt(): k for k, i in enumerate(train)}

    def found(turned: int) -> dict[str, float]:
        def generate(prompts: list[str], **_: object) -> object:
            rows = [train[(at[p] + turned) % len(train)] for p in prompts]
            return type("Out", (), {"images": pixels[rows]})

        model = text_pipe.image_model
        monkeypatch.setattr(type(model), "generate", lambda self, prompts, **how: generate(prompts))
        return recognition(model, data, 20)

    copies, others = found(0), found(1)
    assert copies["nearest"] == copies["among_five_nearest"] == 1.0 and others["nearest"] == 0.0
    assert copies["distance"] < 0.001 < copies["distance_of_unseen"] and copies["prompts"] == len(train)
    assert copies["chance"] == pytest.approx(1 / len(train), abs=0.001)


def test_the_command(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image_folder(tmp_path / "set", 60, size=20)
    words = ["--data", tmp_path / "set", "--model", text_folder, "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["model_card", *map(str, words)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captions end in numbers, which are no words
        assert main() == 0
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["train"]["cross_entropy"] > 0 and report["unseen-concept"]["images"] > 0
    assert "unseen-concept.png: concept not in training" in capsys.readouterr().out
    rows = -(-min(16, report["unseen-concept"]["images"]) // 8)
    assert Image.open(tmp_path / "out" / "unseen-concept.png").size == (8 * (128 + 6), rows * (128 + 14))
