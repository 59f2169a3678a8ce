"""The head of a drafter that predicts which drafts are accepted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.tiny import class_gpt
from visar.cli import main
from visar.drafters import SkippedLayers, drafter_kind
from visar.drafters.acceptance import AcceptanceHead, drafter_mark, head_of, statistics
from visar.dtypes import STORED
from visar.engine.component import Component
from visar.errors import VisarError
from visar.pipelines import ClassToImagePipeline
from visar.samplers import DynamicSpeculative, Speculative

Capture = pytest.CaptureFixture[str]


def train(folder: Path, out: Path, *arguments: object) -> int:
    fixed = ("--batch", 2, "-n", 6, "--no-compile")
    return main([str(a) for a in ("train", "drafter", "--model", folder, "--out", out, *fixed, *arguments)])


@pytest.mark.parametrize("kind", ["model", "eagle"])
def test_a_head_is_trained_saved_loaded_and_asked(
    class_folder: Path, class_pipe: ClassToImagePipeline, tmp_path: Path, kind: str
) -> None:
    assert train(class_folder, tmp_path, "--kind", kind, "--steps", 2) == 0
    before = {f.name: f.read_bytes() for f in (tmp_path / kind).iterdir()}
    assert train(class_folder, tmp_path, "--kind", kind, "--steps", 3, "--acceptance") == 0
    head = tmp_path / kind / "acceptance"
    assert {f.name: f.read_bytes() for f in (tmp_path / kind).iterdir() if f.is_file()} == before and head.is_dir()
    log = json.loads((tmp_path / f"{kind}-acceptance-run" / "log.jsonl").read_text().splitlines()[-1])
    assert log["step"] == 3 and 0 < log["acceptance"] < 1 and log["nats"] > 0
    class_pipe.load_drafter(tmp_path / kind)
    found = head_of(class_pipe.image_model.drafters.loaded[kind])
    assert found is not None and found.config.weight == 6
    asked: list[torch.Tensor] = []
    found.register_forward_hook(lambda head, given, out: asked.append(out))
    sampler = DynamicSpeculative(gamma=2, drafter=kind)
    out = class_pipe([1, 2], sampler=sampler, output_type="tokens", seed=3)
    assert out.stats.exact and asked and all(a.shape == (2, 1) and bool((a > 0).all() & (a < 1).all()) for a in asked)
    assert torch.equal(class_pipe([2], sampler=sampler, output_type="tokens", seed=3).tokens[0], out.tokens[1])
    one = class_pipe([1], sampler=Speculative(gamma=2, drafter=kind), output_type="tokens").stats
    assert one.draft_passes == 2 * one.passes_per_image[0] and one.joined([one]).draft_passes == 2 * one.draft_passes
    asked.clear()
    shutil.rmtree(head)  # as folders are that have none
    class_pipe.load_drafter(tmp_path / kind)
    assert class_pipe([1, 2], sampler=sampler, output_type="tokens", seed=3).stats.exact and not asked


def test_its_chances_are_those_of_the_drafts() -> None:
    """Weighted in the loss, not in what it says: trained where nothing tells drafts apart, it says their mean."""
    torch.manual_seed(0)
    head = AcceptanceHead(8, 4, weight=6.0)
    given = torch.randn(1, 8), torch.randn(1, 3)
    optimizer = torch.optim.Adam(head.parameters(), 0.05)
    for _ in range(300):
        logit = head.logit(*given)
        loss = -0.7 * torch.nn.functional.logsigmoid(logit) - 6 * 0.3 * torch.nn.functional.logsigmoid(-logit)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    assert head.chance(*given).item() == pytest.approx(0.7, abs=0.01)


def test_what_it_reads_of_the_draft_distribution() -> None:
    q = torch.tensor([[[0.5, 0.25, 0.25, 0.0]]])
    found = statistics(torch.tensor([[1]]), q)[0, 0]
    assert found.tolist() == pytest.approx([-1.3863, -0.6931, 1.0397], abs=1e-4)
    certain = torch.eye(4)[None, :1]
    assert statistics(torch.tensor([[0]]), certain)[0, 0].tolist() == [0, 0, 0]


def test_a_head_is_trained_for_the_models_own_drafter(class_folder: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "model-folder", tmp_path / "out"
    shutil.copytree(class_folder, model)
    assert train(model, tmp_path / "first", "--kind", "medusa", "--steps", 2, "--stored-as", "float8_e4m3fn") == 0
    shutil.copytree(tmp_path / "first" / "medusa", model / "medusa")
    assert train(model, out, "--kind", "medusa", "--steps", 2, "--acceptance", "--stored-as", "float8_e4m3fn") == 0
    name = "medusa/diffusion_pytorch_model.safetensors"
    mine, its = load_file(out / name), load_file(model / name)
    assert mine.keys() == its.keys() and all(torch.equal(mine[k].float(), its[k].float()) for k in mine)
    assert (out / "medusa" / "acceptance" / "config.json").exists() and not (model / "medusa" / "acceptance").exists()


def test_a_head_is_of_one_drafter(
    class_folder: Path, class_pipe: ClassToImagePipeline, tmp_path: Path, capsys: Capture
) -> None:
    def tried(*arguments: object) -> str:
        assert train(class_folder, tmp_path, "--kind", "medusa", *arguments) == 2
        return capsys.readouterr().err.splitlines()[-1]

    head = tmp_path / "medusa" / "acceptance"
    assert train(class_folder, tmp_path, "--kind", "medusa", "--steps", 2) == 0
    assert "drafts 3 tokens deep, not the 4 of --depth" in tried("--acceptance", "--depth", 4, "--steps", 2)
    assert train(class_folder, tmp_path, "--kind", "medusa", "--steps", 2, "--acceptance") == 0
    assert f"{head} was trained for the drafter as it is; to train the drafter further, delete" in tried("--steps", 4)
    shutil.move(head, tmp_path / "head")
    assert train(class_folder, tmp_path, "--kind", "medusa", "--steps", 4) == 0
    assert "medusa-acceptance-run holds a run with other settings: drafter was" in tried("--steps", 4, "--acceptance")
    shutil.move(tmp_path / "head", head)
    with pytest.raises(VisarError, match="was trained for another drafter than that in its folder; delete it"):
        class_pipe.load_drafter(tmp_path / "medusa")
    about = json.loads((head / "config.json").read_text())
    del about["drafter"]  # as of a visar that noted none
    (head / "config.json").write_text(json.dumps(about))
    class_pipe.load_drafter(tmp_path / "medusa")


@pytest.mark.parametrize("kind", ["medusa", "skip"])
def test_a_drafter_is_known_in_every_dtype(kind: str, class_pipe: ClassToImagePipeline, tmp_path: Path) -> None:
    target = class_pipe.image_model.family.drafting
    assert target is not None
    drafter, other = (drafter_kind(kind).new(target, depth, 1) for depth in (2, 3))
    if kind == "skip":
        other = SkippedLayers([0])
    marks = {drafter_mark(drafter)}
    for dtype in STORED:
        drafter.save_pretrained(tmp_path / str(dtype), dtype)
        marks.add(drafter_mark(type(drafter).from_pretrained(tmp_path / str(dtype))))
    assert len(marks) == 1 and drafter_mark(other) not in marks


def test_bad_input(class_folder: Path, class_pipe: ClassToImagePipeline, tmp_path: Path, capsys: Capture) -> None:
    for arguments, message in (
        (("--acceptance",), "has a drafter 'eagle'; train one first."),
        (("--acceptance", "--kind", "model", "--layers", 1), "--layers are those of a new drafter"),
    ):
        assert train(class_folder, tmp_path, *arguments) == 2
        assert message in (err := capsys.readouterr().err) and err.count("\n") == 1
    model: Component = class_gpt()
    model.save_pretrained(tmp_path / "small")
    AcceptanceHead(model.config.dim + 1).save_pretrained(tmp_path / "small" / "acceptance")
    with pytest.raises(VisarError, match="reads 33 numbers, its drafter gives 32"):
        class_pipe.load_drafter(tmp_path / "small")
