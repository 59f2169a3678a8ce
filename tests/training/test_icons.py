"""The embedded model: it draws, through the command line, and speculation saves the passes that it promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from visar.cli import main
from visar.drafters import drafter_kinds
from visar.families.source import resolve
from visar.generation.model import ImageModel
from visar.pipelines import TextToImagePipeline

PROMPTS = (
    "a red heart, 3d", "a green apple, flat", "a lion, noto", "a pizza, 3d", "the sun, flat", "a dog face, noto",
    "a blue car, 3d", "a yellow star, flat",
)  # fmt: skip
SHARE = 0.5  # of the passes of sequential decoding


@pytest.fixture(scope="module")
def pipe() -> TextToImagePipeline:
    made = TextToImagePipeline.from_pretrained("icons")
    made.set_progress_bar_config(disable=True)
    return made


def test_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", PROMPTS[0], "--json", "-o", str(tmp_path / "heart.png")]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["sampler"], found["exact"], found["tokens"], found["images"]) == (
        "scd",
        True,
        256,
        [str(tmp_path / "heart.png")],
    )
    image = Image.open(tmp_path / "heart.png")
    assert (image.size, image.mode, image.format) == ((128, 128), "RGB", "PNG") and err == ""
    assert len(image.getcolors(4096) or range(4096)) > 16  # not a blank square


def test_speculation_saves_passes_at_batch_one(pipe: TextToImagePipeline) -> None:
    assert (pipe.config.guidance_scale, pipe.config.top_k) == (3.0, 10)
    sequential = pipe(PROMPTS[0], sampler="ar", output_type="tokens").stats.nfe
    assert sequential == 257  # 256 tokens and the caption; the same for every prompt
    passes = [pipe(p, sampler="scd", output_type="tokens").stats.nfe for p in PROMPTS[:4]]
    assert sum(passes) / len(passes) <= SHARE * sequential, passes


@pytest.mark.slow
def test_eagle_saves_passes(pipe: TextToImagePipeline) -> None:
    stats = pipe(list(PROMPTS[:3]), sampler="eagle", output_type="tokens").stats
    passes = [n + 1 for n in stats.passes_per_image]  # and the caption's
    assert stats.exact and sum(passes) / len(passes) <= 0.55 * 257, passes


@pytest.mark.parametrize("name", ["speculative", "medusa", "hydra", "kangaroo", "swift"])
def test_a_drafter_of_every_kind_comes_with_it(pipe: TextToImagePipeline, name: str) -> None:
    """On images of 8 x 8 tokens, which take a quarter of the passes; the small GPT has a grid of its own."""
    family, grid = pipe.image_model.family, 16 if name == "speculative" else 8
    model = ImageModel(type(family).of(family.components, {**family.settings, "grid": grid}), pipe.image_model.folder)
    model.bar = {"disable": True}
    stats = model.generate(PROMPTS[0], sampler=name, output_type="tokens").stats
    assert stats.exact and stats.sampler == name and max(stats.passes_per_image) < grid**2 and stats.draft_seconds > 0


def test_drafters_are_small() -> None:
    folder = resolve("icons")
    assert isinstance(folder, Path)
    files = [f for kind in drafter_kinds() for f in (folder / kind).rglob("*") if f.is_file()]
    heads = [f for f in files if f.parent.name == "acceptance"]
    assert sum(f.stat().st_size for f in files) < 4 * 2**20 and sum(f.stat().st_size for f in heads) < 40 * 2**10
    assert len(files) - len(heads) == 2 * len(drafter_kinds()) - 1  # skip has no weights
    assert {f.parent.parent.name for f in heads} == {"model"} and len(heads) == 2
