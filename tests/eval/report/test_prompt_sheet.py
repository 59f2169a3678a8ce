"""The contact sheet of common prompts, and its score."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from visar import TextToImagePipeline
from visar.errors import VisarError
from visar.eval.report.prompt_sheet import CAPTIONS, NOUNS, drawings, main, prompt_sheet, r_precision, things
from visar.generation.model import ImageModel
from visar.text_encoders.concepts import concepts


@pytest.fixture(scope="module")
def icons() -> ImageModel:
    model = ImageModel.load("icons")
    model.bar = {"disable": True}
    return model


def test_images_stand_where_their_prompts_do(text_pipe: TextToImagePipeline) -> None:
    prompts = ("cat", "dog", "red")
    images = drawings(text_pipe.image_model, prompts, seeds=2)
    sheet = prompt_sheet(prompts, images, side=16, columns=2)
    assert sheet.size == (2 * (32 + 6), 2 * (16 + 14))
    for i, prompt in enumerate(prompts):
        for k in range(2):
            (image,) = text_pipe(prompt, seed=k).images or ()
            x, y = i % 2 * 38 + k * 16, i // 2 * 30
            wanted = image.resize((16, 16), Image.Resampling.LANCZOS)
            assert ImageChops.difference(sheet.crop((x, y, x + 16, y + 16)), wanted).getbbox() is None


def test_the_things_are_the_nouns_and_some_of_the_list() -> None:
    named, others = things(concepts("icons").names())
    assert len(named) == len(set(named)) == 60 and named[:30] == list(NOUNS)
    assert set(named[30:]) <= set(concepts("icons").names()) and not set(named) & set(others)
    assert (named, others) == things(concepts("icons").names()[::-1])


def test_the_score_tells_right_captions_from_wrong_ones(icons: ImageModel) -> None:
    _, others = things(concepts("icons").names())
    globes = drawings(icons, ["a globe, 3d"], seeds=3)
    right, wrong = (r_precision([thing], globes, others, "3d") for thing in ("globe", "guitar"))
    assert right["images"] == 3 and right["chance"] == 1 / CAPTIONS
    assert (
        right["first"] == right["first_of_nouns"] >= 0.6 and right["among_five"] == 1.0 and wrong["among_five"] == 0.0
    )
    with pytest.raises(VisarError, match="needs 99 other things; the model's list has 98"):
        r_precision(["globe"], globes, [*others[:98], "globe showing americas"])


def test_the_command(
    text_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["prompt_sheet", *map(str, words), "--out", str(tmp_path / "a.png")])
        return main()

    assert run("--seeds", 0) == 2 and "--seeds must be 1 or more, not 0" in capsys.readouterr().err
    assert run("--model", text_folder) == 2 and "no list of what it knows" in capsys.readouterr().err
    monkeypatch.setattr("visar.eval.report.prompt_sheet.things", lambda known: (["heart"], sorted(known)))
    assert run("--seeds", 1, "--score") == 0
    score, path = capsys.readouterr().out.splitlines()
    assert json.loads(score)["images"] == 1 and Path(path) == tmp_path / "a.png"
    assert Image.open(path).size == (3 * (128 + 6), 128 + 14)
