"""The distance of a two-way model from its trunk, against plain sums."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.tiny import VQ, class_gpt
from tests.helpers.two_way import GRID, gpt, inputs
from visar.errors import VisarError
from visar.eval.quality.cross_entropy import Sample
from visar.eval.quality.two_way import check, distance, main
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.two_way import TwoWayLlamaGen
from visar.families.llamagen.vq import VQModel
from visar.generation.model import ImageModel
from visar.pipelines import ClassToImagePipeline


def model_of(network: LlamaGen) -> ImageModel:
    torch.manual_seed(2)
    return ClassToImagePipeline(gpt=network, vq=VQModel(**VQ).eval(), guidance_scale=2.0, top_k=3).image_model


def test_distance_by_hand() -> None:
    heads, (condition, _, tokens) = gpt("class"), inputs("class")
    trunk = heads.trunk
    found = distance(model_of(heads), model_of(trunk), Sample(condition, None, tokens), batch=2)
    one, other = (
        torch.stack([m(c, tokens[:, :-1]) for c in (condition, torch.full_like(condition, 7))]) for m in (trunk, heads)
    )
    own = [-x[0].log_softmax(-1).gather(-1, tokens[..., None]).mean().item() for x in (one, other)]
    assert (found.trunk, found.two_way) == (pytest.approx(own[0], rel=1e-5), pytest.approx(own[1], rel=1e-5))
    overlap = accepted = 0.0
    for b in range(3):
        for n in range(GRID**2):
            laws = []
            for x in (one, other):
                guided = (x[1] + 2 * (x[0] - x[1]))[b, n]
                kept = guided.topk(3).indices
                laws.append(torch.zeros(24).index_copy(0, kept, guided[kept].softmax(0)))
            overlap += float(torch.minimum(*laws).sum()) / (3 * GRID**2)
            accepted += float((laws[0] * laws[1]).sum()) / (3 * GRID**2)
    assert (found.overlap, found.accepted) == (pytest.approx(overlap, rel=1e-4), pytest.approx(accepted, rel=1e-4))
    assert 0 < found.accepted <= found.overlap < 1 and found.images == 3


def test_models_that_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heads, plain = model_of(gpt("class")), model_of(class_gpt())
    for one, other, message in (
        (plain, plain, "compares a LlamaGen with two-way heads"),
        (heads, heads, "with none, as --trunk"),
        (heads, plain, "of different sizes"),
        (model_of(TwoWayLlamaGen(24, 32, 1, 2, 48, classes=7, grid=5, vertical_start=1)), plain, ""),
    ):
        if message:
            with pytest.raises(VisarError, match=message):
                check(one, other)
        else:
            check(one, other)
    assert main(["--model", str(tmp_path / "none")]) == 2 and "There is no model" in capsys.readouterr().err
    assert main(["--model", "icons", "--images", "1"]) == 2 and "--images must be 2" in capsys.readouterr().err
