"""Captioned images of any folder: reading them, prompts, and what is held out."""

from __future__ import annotations

import json
import random
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.helpers.tiny import WORDS, image_folder
from visar.errors import VisarError
from visar.families.llamagen.vq import VQConfig
from visar.training.data import ImageSet, Record, to_unit

SIZES = VQConfig(16, 4, channels=32, channel_multipliers=(1, 2), res_blocks=1, z_channels=16)
STYLES = ("flat", "glossy", "3d", "noto")


# The image set


def test_three_forms_of_a_set(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "json", 3)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    (tmp_path / "txt" / "deep").mkdir(parents=True)
    for i in range(3):
        (folder / f"{i}.png").rename(tmp_path / "txt" / "deep" / f"{i}.png")
        (tmp_path / "txt" / "deep" / f"{i}.txt").write_text(f" {WORDS[i]} {i}\n")
    (tmp_path / "txt" / "no caption.png").touch()
    zipped, texts = ImageSet(tmp_path / "set.zip"), ImageSet(tmp_path / "txt")
    assert [r.caption for r in zipped.records] == [r.caption for r in texts.records] == ["red 0", "blue 1", "heart 2"]
    assert zipped.records[1] == Record("1.png", "blue 1", "", ("a", "b"), "thing 1", "odd")
    assert texts.records[1] == Record("deep/1.png", "blue 1", concept="blue 1")
    assert torch.equal(zipped.pixels(8), texts.pixels(8))
    assert zipped.pixels(8)[1, :, 0, 0].tolist() == [37, 91, 0]


def test_pixels_are_resized_on_white(tmp_path: Path) -> None:
    clear, half = Image.new("RGBA", (4, 4), (0, 0, 0, 0)), Image.new("RGBA", (6, 6), (255, 0, 0, 128))
    for name, image in (("a", clear), ("b", half)):
        image.save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    pixels = ImageSet(tmp_path).pixels(8)
    assert pixels.shape == (2, 3, 8, 8) and pixels.dtype == torch.uint8 and (pixels[0] == 255).all()
    assert pixels[1, 0].eq(255).all() and (pixels[1, 1:].int() - 127).abs().max() <= 1
    assert to_unit(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_filters(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "set", 6, ("flat", "noto"))
    assert len(ImageSet(folder).records) == 12
    assert {r.style for r in ImageSet(folder, styles=("noto",)).records} == {"noto"}
    assert {r.group for r in ImageSet(folder, without_groups=("odd",)).records} == {"even"}
    listed = json.loads((folder / "pictures.json").read_text())
    by_style = [entry | {"group": {"noto": "odd", "flat": "even"}[entry["style"]]} for entry in listed]
    (folder / "pictures.json").write_text(json.dumps(by_style))
    assert len(ImageSet(folder, ("noto",), without_groups=("even",)).records) == 6  # it filters nothing there
    for name, where in (("style", {"styles": ("odd",)}), ("group", {"without_groups": ("flat",)})):
        with pytest.raises(VisarError, match=rf"No image has {name} '\w+'; the {name}s are \w+, \w+\."):
            ImageSet(folder, **where)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return ImageSet(image_folder(tmp_path_factory.mktemp("large") / "set", 300, STYLES, size=1))


def test_no_concept_and_no_drawing_leaks(large: ImageSet) -> None:
    splits: dict[str, set[str]] = {}
    drawings: dict[tuple[str, str], set[str]] = {}
    for record, split in zip(large.records, large.splits, strict=True):
        splits.setdefault(record.concept, set()).add(split)
        drawings.setdefault((record.concept, record.drawing), set()).add(split)
    assert all(len(found) == 1 for found in drawings.values())  # flat, glossy and 3d show one drawing
    kinds = Counter(frozenset(found) for found in splits.values())
    assert kinds.keys() == {frozenset({"train"}), frozenset({"unseen-concept"}), frozenset({"train", "unseen-style"})}
    assert 3 <= kinds[frozenset({"unseen-concept"})] <= 24 and 3 <= kinds[frozenset({"train", "unseen-style"})] <= 24
    counts = [len(large.indices(s)) for s in ("train", "unseen-concept", "unseen-style")]
    assert sum(counts) == 1200 and min(counts) > 0


def test_a_split_does_not_depend_on_the_other_images(large: ImageSet) -> None:
    few = ImageSet(large.path, without_groups=("odd",))
    before = {r.file: s for r, s in zip(large.records, large.splits, strict=True)}
    assert {r.file: s for r, s in zip(few.records, few.splits, strict=True)}.items() <= before.items()


def test_prompts() -> None:
    record = Record("x.png", "red heart", "3d", ("love", "card"))
    assert record.prompt() == "red heart, 3d" and Record("x.png", "red heart").prompt() == "red heart"
    rng = random.Random(0)
    seen = Counter(record.prompt(rng) for _ in range(2000))
    assert {"red heart, 3d", "red heart", "red heart love, 3d", "card love, 3d", "card"} <= seen.keys()
    assert 0.6 < seen["red heart, 3d"] / 2000 < 0.9
    plain = {Record("x.png", "red heart", "3d").prompt(rng) for _ in range(100)}
    assert plain == {"red heart, 3d", "red heart"}


def test_photographs_of_any_format_are_turned(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), "white")
    image.paste("black", (0, 0, 8, 4))  # the upper half, which is to be shown on the right
    turned = Image.Exif()
    turned[0x112] = 6
    image.save(tmp_path / "a.tif", exif=turned)
    (tmp_path / "a.txt").write_bytes("a 💩".encode("utf-16"))
    data = ImageSet(tmp_path)
    assert data.records[0].caption == "a 💩"
    assert (data.pixels(8)[0, :, :, :4] == 255).all() and (data.pixels(8)[0, :, :, 4:] == 0).all()
    (tmp_path / "own" / "set").mkdir(parents=True)
    (tmp_path / "own" / "set" / "pictures.json").write_text('[{"file": "../../a.tif", "caption": "b"}]')
    with pytest.raises(VisarError, match="not inside it"):
        ImageSet(tmp_path / "own" / "set").pixels(8)


def test_bad_sets_are_named(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "set", 2, ("flat", "noto"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.zip").write_text("no zip")
    for name, listing in (("cut", "["), ("keys", '[{"file": "a.png"}]'), ("gone", '[{"file": "a", "caption": "b"}]')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pictures.json").write_text(listing)
    for name, message in {
        "none": "No image folder at",
        "empty": "holds no captioned images",
        "bad.zip": "bad.zip is no image set",
        "cut": r"Cannot read .*cut/pictures\.json: it is not valid JSON",
        "keys": r"Cannot read .*keys/pictures\.json: 0 has no 'caption'",
    }.items():
        with pytest.raises(VisarError, match=message):
            ImageSet(tmp_path / name)
    with pytest.raises(VisarError, match=r"No image has style 'oil'; the styles are flat, noto\."):
        ImageSet(folder, styles=("oil",))
    with pytest.raises(VisarError, match="holds no captioned images"):
        ImageSet(folder, without_groups=("odd", "even"))
    with pytest.raises(VisarError, match="Cannot read image a of"):
        ImageSet(tmp_path / "gone").pixels(8)
