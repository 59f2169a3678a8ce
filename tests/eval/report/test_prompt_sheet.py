"""The contact sheet of common prompts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from visar import TextToImagePipeline
from visar.eval.report.prompt_sheet import main, prompt_sheet


def test_images_stand_where_their_prompts_do(text_pipe: TextToImagePipeline) -> None:
    sheet = prompt_sheet(text_pipe.image_model, ("cat", "dog", "red"), seeds=2, side=16, columns=2)
    assert sheet.size == (2 * (32 + 6), 2 * (16 + 14))
    for i, prompt in enumerate(("cat", "dog", "red")):
        for k, image in enumerate(text_pipe(prompt, num_images_per_prompt=2).images or ()):
            x, y = i % 2 * 38 + k * 16, i // 2 * 30
            wanted = image.resize((16, 16), Image.Resampling.LANCZOS)
            assert ImageChops.difference(sheet.crop((x, y, x + 16, y + 16)), wanted).getbbox() is None


def test_bad_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["prompt_sheet", "--seeds", "0", "--out", str(tmp_path / "a.png")])
    assert main() == 2 and "--seeds must be 1 or more, not 0" in capsys.readouterr().err
