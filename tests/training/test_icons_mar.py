"""The embedded masked model: it draws, its head speculation saves rounds, and its tokens have the right law."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from visar.cli import main
from visar.eval.exactness.head_mutants import Untested
from visar.eval.exactness.joint import EXACT_LIMIT, MUTANT_LIMIT
from visar.eval.exactness.ranks import rank_test
from visar.families.mar.session import MARSession
from visar.families.source import resolve
from visar.pipelines import TextToImagePipeline
from visar.samplers import ContinuousSpeculative, HeadSpeculation, MaskedAutoregressive

PROMPTS = ("a red heart, 3d", "a lion, 3d", "a green apple, 3d", "a pizza, 3d")
SHARE = 0.4  # of the head rounds of plain decoding
IMAGES = 64  # the mistake is at z = 17 with as many, which take 40 s of one core a sampler


@cache
def embedded() -> Any:
    pipe = TextToImagePipeline.from_pretrained("icons-mar").to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
def test_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "heart.png"
    assert main(["generate", "a red heart", "--model", "icons-mar", "--json", "-o", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["sampler"], found["exact"], found["nfe"], found["tokens"]) == ("mar-headspec", True, 64, 256)
    assert found["calls_per_pass"] <= SHARE * found["denoising_steps"]
    image = Image.open(out)
    assert (image.size, image.mode) == ((128, 128), "RGB") and len(image.getcolors(4096) or range(4096)) > 16


def test_a_red_heart_is_red() -> None:
    """The one thing that is looked at: more red than blue and green, on white."""
    sampler = MaskedAutoregressive(steps=16, head_steps=25)
    (image,) = embedded()("a red heart, 3d", sampler=sampler, output_type="pt").images
    red, green, blue = image[:, 32:96, 32:96].mean((1, 2)).tolist()
    assert red > green + 0.2 and red > blue + 0.2 and image[:, :8, :8].mean() > 0.9


@cache
def mostly_given() -> torch.Tensor:
    """An image's tokens, of which 16 in its middle are to be drawn again."""
    forced = embedded()(PROMPTS[1], sampler=MaskedAutoregressive(steps=16, head_steps=12), output_type="tokens").tokens[
        0
    ]
    forced = forced.unflatten(0, (16, 16)).clone()
    forced[6:10, 6:10] = float("nan")
    return forced.flatten(0, 1)


@pytest.mark.parametrize("name", [pytest.param("cspd", marks=pytest.mark.slow), "cspd-exact"])
def test_its_draft_model_drafts(name: str) -> None:
    exact = name == "cspd-exact"
    sampler = ContinuousSpeculative(gamma=4, head_steps=12, factor=not exact, nested=exact, prefill=0.0)
    stats = embedded()(PROMPTS[1], sampler=sampler, forced_tokens=mostly_given(), output_type="tokens").stats
    assert stats.sampler == name and stats.exact == exact and stats.draft_seconds > 0 and stats.tested >= stats.nfe
    assert 4 <= stats.nfe <= 16


def test_it_is_small() -> None:
    folder = resolve("icons-mar")
    assert isinstance(folder, Path) and [f.name for f in (folder / "text_encoder").iterdir()] == ["concepts.json"]
    parts = [f for part in ("mar", "draft", "vae") for f in (folder / part).iterdir()]
    assert sum(f.stat().st_size for f in parts) < 9 * 2**20 and len(parts) == 6


def ranked(sampler: Any, images: int) -> float:
    """z of the ranks of 16 tokens, which are drawn anew around the others of an image, in many images at once."""
    pipe: TextToImagePipeline = embedded()
    forced = mostly_given()
    free = forced.isnan().any(-1)
    features, _ = pipe.text_encoder.encode([PROMPTS[1]])

    def session(images: torch.Tensor) -> MARSession:
        g = torch.Generator().manual_seed(0)
        order = torch.cat([(~free).nonzero()[:, 0], free.nonzero()[torch.randperm(16, generator=g), 0]])
        rows = order.expand(len(images), -1)
        given = forced[order[:240]].expand(len(images), -1, -1)
        return MARSession(pipe.mar, features.expand(len(images), -1, -1), rows, 2.0, given=given)

    return rank_test(session, sampler, torch.arange(images)).z


@pytest.mark.slow
def test_ranks_on_the_shipped_weights() -> None:
    few: dict[str, Any] = {"steps": 4, "head_steps": 12}
    assert abs(ranked(MaskedAutoregressive(**few), IMAGES)) < EXACT_LIMIT
    assert abs(ranked(HeadSpeculation(**few, draft=6), IMAGES)) < EXACT_LIMIT
    assert ranked(Untested(**few, draft=12, adaptive=False), IMAGES) > MUTANT_LIMIT
