"""What every family of models of transformers is asked of its folders: commands, verification, and damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.tiny_hf import PROMPTS
from visar import cli
from visar.errors import VisarError
from visar.generation.model import ImageModel

Damage = dict[str, tuple[Callable[[Path], Any], str]]  # what is done to a folder, and the message


def edited(file: str, **changes: Any) -> Callable[[Path], Any]:
    """Other values in a file of JSON."""

    def edit(path: Path) -> None:
        found = json.loads((path / file).read_text())
        (path / file).write_text(json.dumps(found | changes))

    return edit


def check_damaged(folder: Path, tmp_path: Path, spoil: Callable[[Path], Any], message: str, **options: Any) -> None:
    """Loading a spoilt copy is refused in one line."""
    spoil(path := Path(shutil.copytree(folder, tmp_path / "model")))
    with pytest.raises(VisarError, match=message) as caught:
        ImageModel.load(path, **options)
    assert "\n" not in str(caught.value)


def check_commands(folder: Path, tmp_path: Path, size: tuple[int, int], *given: str, samplers: str = "ar") -> None:
    """`visar generate`, `sample` and `bench` work on a folder, with the options `given`."""
    model = ["--model", str(folder), *given]
    assert cli.main(["generate", "a red heart", *model, "-o", str(tmp_path / "a.png"), "--top-k", "1"]) == 0
    assert Image.open(tmp_path / "a.png").size == size
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    run = ["sample", "--prompts", str(tmp_path / "prompts.txt"), *model, "-n", "4", "--out", str(tmp_path / "many")]
    assert cli.main(run) == 0 and len(list((tmp_path / "many").glob("*.png"))) == 4
    assert cli.main(["bench", *model, "--samplers", samplers, "--repeats", "1", "-n", "1"]) == 0


def check_verified(folder: Path, capsys: pytest.CaptureFixture[str], samplers: str, *given: str) -> None:
    """`visar verify` passes on a folder."""
    capsys.readouterr()
    names = ["--samplers", samplers, "--sequences", "16384", "--json"]
    assert cli.main(["verify", "--model", str(folder), *given, *names]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == samplers.count(",") + 1 and all(row["passed"] for row in rows)
