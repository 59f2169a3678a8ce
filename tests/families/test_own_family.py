"""The family of docs/own-family.md: 60 lines, and everything above families works with it."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.helpers.stepped import served
from visar import cli
from visar.demo.models import named
from visar.demo.requests import Limits, checked
from visar.errors import VisarError
from visar.eval.exactness.joint import EXACT_LIMIT
from visar.families import registry
from visar.generation.model import ImageModel
from visar.pipelines import load
from visar.serving.engine import Engine

PAGE = (Path(__file__).parents[2] / "docs" / "own-family.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", PAGE, re.S)[0]
EXACT = ("ar", "sjd", "scd", "scd-gumbel")


@pytest.fixture(scope="module")
def stripes() -> Iterator[Any]:
    registry._REGISTERED.pop("stripes", None)  # where the page itself was run in this process
    module = types.ModuleType("stripes_family")
    exec(compile(CODE, "own-family.md", "exec"), vars(module))
    yield module
    del registry._REGISTERED["stripes"]


@pytest.fixture(scope="module")
def folder(stripes: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path: Path = tmp_path_factory.mktemp("families") / "stripes-model"
    stripes.StripeDecoder().save_pretrained(path / "decoder")
    (path / "config.json").write_text(json.dumps({"model_type": "stripes"}))
    return path


def test_it_is_short() -> None:
    assert len([line for line in CODE.splitlines() if line.strip()]) <= 65


def test_images_have_its_shape_line_ends_and_codes_alone(folder: Path) -> None:
    pipe = load(folder)
    pipe.set_progress_bar_config(disable=True)
    seen: list[Any] = []
    for sampler in EXACT:
        out = pipe(["wide", "tall"], sampler=sampler, seed=1, callback=seen.append)
        assert out.images[0].size == (20, 12) and out.tokens.shape == (2, 18)
        ends = out.tokens.view(2, 3, 6)
        assert (ends[..., 5] == 16).all() and (ends[..., :5] < 16).all(), sampler
    assert seen[0].preview().shape == (2, 3, 5, 3) and seen[0].images()[0].size == (20, 12)
    assert torch.equal(
        pipe("tall", seed=1, sampler="ar").tokens, pipe(["wide", "tall"], seed=1, sampler="ar").tokens[1:]
    )


def test_samplers_agree_on_the_distribution_of_the_first_tokens(folder: Path) -> None:
    """Of 4,096 images two tokens around a forced one, under temperature and top-p, against plain sampling's own."""
    model = ImageModel.load(folder)
    model.bar = {"disable": True}
    forced = torch.full((18,), -1)
    forced[1] = 7
    counts = {}
    for sampler in ("ar", "scd"):
        settings: dict[str, Any] = {"temperature": 1.4, "top_p": 0.9, "forced_tokens": forced}
        out = model.generate(["wide"], sampler=sampler, num_images=4096, seed=3 if sampler == "ar" else 4, **settings)
        assert (out.tokens[:, 1] == 7).all()
        counts[sampler] = torch.bincount(out.tokens[:, 0] * 16 + out.tokens[:, 2], minlength=256).double()
    a, b = counts["ar"], counts["scd"]
    often = a + b >= 20
    chi = ((a - b)[often].square() / (a + b)[often]).sum() - often.sum()
    assert abs(chi / (2 * often.sum()).sqrt()) < EXACT_LIMIT


def test_the_command_line_generates_samples_and_measures(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(folder)]
    assert cli.main(["generate", "wide", *model, "-o", str(tmp_path / "a.png"), "--sampler", "scd"]) == 0
    assert Image.open(tmp_path / "a.png").size == (20, 12)
    (tmp_path / "prompts.txt").write_text("wide\ntall\n")
    run = ["sample", "--prompts", str(tmp_path / "prompts.txt"), *model, "-n", "4", "--out", str(tmp_path / "many")]
    assert cli.main(run) == 0 and len(list((tmp_path / "many").glob("*.png"))) == 4
    assert cli.main(["bench", *model, "--samplers", "ar,scd", "--repeats", "1", "-n", "2"]) == 0
    assert "scd" in capsys.readouterr().out
    assert cli.main(["generate", "wide", *model, "--sampler", "eagle"]) == 2
    assert "needs a drafter" in capsys.readouterr().err
    assert cli.main(["verify", *model, "--samplers", "scd", "--sequences", "16384", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["sampler"] == "scd" and row["passed"] and row["sequences"] == 910
    for wrong in (["--class", "1"], ["--session", "x.py:make"], ["--samplers", "zipar"]):
        assert cli.main(["verify", *model, *wrong]) == 2
    assert cli.main(["verify", "--prompt", "wide"]) == 2
    assert "go with --model" in capsys.readouterr().err


def test_the_demo_decodes_it(folder: Path) -> None:
    model = named([("stripes", load(folder))])["stripes"]
    assert "scd" in model.samplers and "eagle" not in model.samplers
    settings = dict(seed=5, guidance_scale=1.0, temperature=1.0, top_k=0, top_p=1.0)
    request = checked(model, "wide", None, [("scd", {"window": 4})], 1, settings, Limits())
    engine = Engine(rows=1)
    (run,) = served(engine, request)
    assert engine.close(timeout=60) and run.done and run.frame is not None and run.frame.image.size == (20, 12)


def test_what_it_does_not_have_is_said(folder: Path) -> None:
    model = ImageModel.load(folder)
    with pytest.raises(VisarError, match="needs a drafter of the kind 'eagle'"):
        model.generate(["wide"], sampler="eagle")
    with pytest.raises(VisarError, match="'stripes' cannot be rounded"):
        model.quantize("int8")
    with pytest.raises(VisarError, match="a family 'stripes' already"):
        registry.register_family(type("Other", (), {"name": "stripes"}))  # type: ignore[arg-type]
