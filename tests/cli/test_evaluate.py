"""`visar eval` on the command line; what it measures is tested elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.tiny import Cells
from visar.cli import main
from visar.eval.quality.image_folder import ImageFolder
from visar.eval.quality.protocols import protocol_names

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network is needed to see what the commands do."""
    for module in ("visar.eval.quality.measure", "visar.eval.quality.extractors"):
        monkeypatch.setattr(f"{module}.get_extractor", lambda *_: Cells())


def folder(path: Path, seed: int, count: int = 260, shift: int = 0) -> Path:
    path.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 200, (6, 6, 3), np.uint8) + np.uint8(shift)).save(path / f"{i:03d}.png")
        (path / f"{i:03d}.txt").write_text(f"thing {i % 13}")
    return path


def run(*arguments: Any) -> int:
    return main(["eval", *map(str, arguments)])


def test_figures_against_images_and_against_their_statistics(tmp_path: Path, capsys: Capture) -> None:
    a, b, out = folder(tmp_path / "a", 1), folder(tmp_path / "b", 2), tmp_path / "b.npz"
    named = ("--protocol", "icons-efflite0")
    assert run("fid", a, *named, "--reference", b, "--json", tmp_path / "one.json") == 0
    told = capsys.readouterr().out
    assert told.startswith("fd-efflite0,") and "icons-efflite0@1 n=260" in told and "ref-images=sha256:" in told
    assert run("stats", b, *named, "--out", out) == 0
    assert "260 images, sha256:" in capsys.readouterr().out
    assert run("fid", a, *named, "--reference", out, "--json", tmp_path / "two.json") == 0
    assert "kid-efflite0 was left out" in capsys.readouterr().err
    one, two = (json.loads((tmp_path / f"{name}.json").read_text())["values"] for name in ("one", "two"))
    assert one["fd-efflite0"] == pytest.approx(two["fd-efflite0"], rel=1e-9) and set(two) == {"fd-efflite0"}


def test_statistics_of_parts_are_those_of_the_whole(tmp_path: Path, capsys: Capture) -> None:
    whole = folder(tmp_path / "whole", 1, 600)
    named = ("--protocol", "icons-efflite0")
    parts = []
    for k in range(2):
        part = tmp_path / f"part{k}"
        part.mkdir()
        for i in range(k * 300, k * 300 + 300):
            (part / f"{i:03d}.png").write_bytes((whole / f"{i:03d}.png").read_bytes())
        parts.append(tmp_path / f"part{k}.npz")
        assert run("stats", part, *named, "--out", parts[-1]) == 0
    assert run("stats", whole, *named, "--out", tmp_path / "whole.npz") == 0
    assert run("stats", *parts, *named, "--out", tmp_path / "merged.npz") == 0
    assert "600 images" in capsys.readouterr().out.splitlines()[-1]
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("whole", "merged"))
    for key in ("mu", "sigma", "n"):
        np.testing.assert_allclose(one[key], two[key], rtol=1e-9, atol=1e-12)


def test_compare(tmp_path: Path, capsys: Capture) -> None:
    a, b, c = folder(tmp_path / "a", 1), folder(tmp_path / "b", 2), folder(tmp_path / "c", 1, shift=20)
    assert run("compare", a, b, "--seeds", folder(tmp_path / "d", 3), "--reference", c) == 0
    told = capsys.readouterr().out
    assert told.startswith("No change seen in 260 pairs")
    for line in ("260 pairs of 13 prompts: 0.0% of", "Energy distance of cells", "Within a prompt:",
                 "A against another", "Energy distance to the reference: A "):  # fmt: skip
        assert line in told
    assert run("compare", a, c, "--json", tmp_path / "out.json") == 0
    assert capsys.readouterr().out.startswith("Changed: the images as a whole, images of one prompt (energy")
    assert json.loads((tmp_path / "out.json").read_text())["changed"] is True


def test_protocols(capsys: Capture) -> None:
    assert run("protocols") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == protocol_names()
    assert run("protocols", "--json") == 0
    assert {p["name"] for p in json.loads(capsys.readouterr().out)} == set(protocol_names())


def test_captions_in_a_file(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def measure(protocol: str, images: ImageFolder, **_: Any) -> Any:
        given.append((protocol, images.captions["001"]))
        raise KeyboardInterrupt

    monkeypatch.setattr("visar.eval.quality.measure.measure", measure)
    (tmp_path / "captions.json").write_text(json.dumps({"001": "another"}))
    assert run("clip", folder(tmp_path / "a", 1, 3), "--captions", tmp_path / "captions.json") == 130
    assert given == [("clip-vit-b32", "another")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("fid A --protocol icons-efflite0", "needs a reference"),
        ("fid A --protocol fid --reference A", "Unknown protocol 'fid'"),
        ("fid A --protocol imagenet256-adm --reference A", "measures images of 256x256 pixels, not 6x6"),
        ("fid NONE --protocol icons-efflite0", "There are no images at"),
        ("fid A --protocol icons-efflite0 --reference A --batch 0", "--batch must be 1 or more"),
        ("fid FEW --protocol icons-efflite0 --reference A", "needs 256 or more images, and"),
        ("clip A --protocol icons-efflite0", "needs a reference"),
        ("stats A --protocol icons-efflite0 --out a.txt", "Statistics are written as .npz, not a.txt"),
        ("compare A FEW", "lacks 257 images"),
        ("compare A A --clip icons-efflite0", "has no CLIP score"),
        ("compare A A --json NONE/x/y.json", ""),
    ],
)
def test_bad_input(tmp_path: Path, capsys: Capture, arguments: str, message: str) -> None:
    folder(tmp_path / "A", 1)
    folder(tmp_path / "FEW", 1, 3)
    given = [str(tmp_path / word) if word in ("A", "FEW", "NONE") else word for word in arguments.split()]
    if not message:  # a folder that cannot be made
        (tmp_path / "NONE").touch()
        given = [word.replace("NONE", str(tmp_path / "NONE")) for word in given]
        message = "Cannot write to folder"
    assert run(*given) == 2
    told = capsys.readouterr().err
    (line,) = [line for line in told.splitlines() if not line.startswith("visar: note:")]
    assert line.startswith("visar: error:") and message in line
