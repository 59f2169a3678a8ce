"""The embedded model with two-way heads: it draws in 32 passes, as it says, and shares what it does not change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import visar
from visar.cli import main
from visar.engine.component import WEIGHTS, read_tensors
from visar.errors import VisarError
from visar.families.catalogue import EMBEDDED, Listing
from visar.families.source import resolve
from visar.generation.model import ImageModel


def test_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "heart.png"
    assert main(["generate", "a red heart, 3d", "--model", "icons-two-way", "--json", "-o", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["sampler"], found["exact"], found["nfe"], found["tokens"]) == ("diagonal", True, 32, 256)
    assert "another model than its trunk" in found["exactness"]
    image = Image.open(out)
    red, green, blue = (sum(band.crop((40, 40, 88, 88)).getdata()) / 48**2 for band in image.split())
    assert image.size == (128, 128) and red > green + 50 and red > blue + 50
    assert min(image.getpixel((2, 2))) > 230  # type: ignore[arg-type, type-var]


def test_what_it_shares_and_what_it_is_not() -> None:
    """Tokenizer and words are those of `icons`, and so is what it knows; no sampler in raster order takes it."""
    folder, own, icons = resolve("icons-two-way"), ImageModel.load("icons-two-way"), ImageModel.load("icons")
    assert isinstance(folder, Path) and {f.name for f in folder.iterdir() if f.is_dir()} == {"gpt", "text_encoder"}
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 7 * 10**6
    for part in ("vq", "text_encoder"):
        ours, theirs = (model.family.components[part].state_dict() for model in (own, icons))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    things = [model.family.components["text_encoder"].concepts for model in (own, icons)]
    assert things[0].names() == things[1].names()
    with pytest.raises(VisarError, match=r"For it there is: diagonal"):
        visar.load("icons-two-way")("a cat", sampler="scd")


def test_assembled_it_is_what_ships(tmp_path: Path) -> None:
    """Packed again it is the same file: the numbers of a row are whole already."""
    folder, again = resolve("icons-two-way"), tmp_path / "again"
    assert isinstance(folder, Path)
    parts = ["--gpt", "icons-two-way", "--tokenizer", "icons", "--words", "icons", "--gpt-dtype", "int6"]
    assert main(["train", "assemble", *parts, "--top-k", "10", "-o", str(again)]) == 0
    index, own = (json.loads((f / "model_index.json").read_text()) for f in (folder, again))
    assert index == own and not (again / "vq").exists() and not (again / "text_encoder").exists()
    file = f"gpt/{WEIGHTS}"
    assert (again / file).stat().st_size == (folder / file).stat().st_size
    ours, theirs = read_tensors(again / file), read_tensors(folder / file)
    assert all(torch.allclose(ours[key], theirs[key], rtol=1e-5, atol=1e-7) for key in theirs)
    assert main(["train", "assemble", *parts[:3], "icons-mar", *parts[4:], "-o", str(tmp_path / "no")]) == 2


@pytest.mark.parametrize("listing", EMBEDDED, ids=lambda listing: listing.name)
def test_the_list_counts_the_parameters_that_decode(listing: Listing) -> None:
    family = ImageModel.load(listing.name).family
    decoder = family.components["mar" if listing.name == "icons-mar" else "gpt"]
    assert sum(p.numel() for p in decoder.parameters()) == listing.parameters
