"""Two-way heads are trained in two stages, go on after an interruption, and make a model that is assembled as any."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.tiny import class_gpt, image_folder
from tests.helpers.training import config, log_of
from visar.cli import main
from visar.errors import VisarError
from visar.families.llamagen.gpt import LlamaGen, initialise
from visar.families.llamagen.two_way import TwoWayLlamaGen, is_branch
from visar.families.llamagen.vq import VQModel
from visar.text_encoders.words import WordEncoder
from visar.training.ar import ARLoss, corrupt
from visar.training.data import ImageSet
from visar.training.loop import make_optimizers
from visar.training.two_way import TRUNK, train_two_way

pytestmark = pytest.mark.filterwarnings("ignore:Words not known")


def tokenizer() -> VQModel:
    torch.manual_seed(0)
    return VQModel(16, 4, 32, (1, 2), 1, 16).eval()


def trunk() -> LlamaGen:
    torch.manual_seed(1)
    sizes: dict[str, Any] = dict(vocab_size=16, dim=32, num_layers=2, num_heads=2, ffn=32, grid=4)
    return initialise(LlamaGen(**sizes, condition="text", condition_length=4, caption_features=6))


def moved(before: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, float]:
    return {k: float((v - before[k]).abs().max()) for k, v in model.state_dict().items() if k in before}


def test_both_stages(words: WordEncoder, tmp_path: Path) -> None:
    data, vq, start = ImageSet(image_folder(tmp_path / "set", 30)), tokenizer(), trunk()
    before = {k: v.clone() for k, v in start.state_dict().items()}
    run = config(tmp_path / "one", steps=16, batch=8, lr=1e-2, ema=0.9, optimizer="muon")
    first = train_two_way(data, 8, run, vq, words, start)
    assert set(moved(before, first).values()) == {0.0}  # the trunk is frozen
    state = {k: v.clone() for k, v in first.state_dict().items()}
    saved = LlamaGen.from_pretrained(tmp_path / "one" / "gpt")
    assert isinstance(saved, TwoWayLlamaGen) and all(torch.equal(saved.state_dict()[k], v) for k, v in state.items())
    row = log_of(tmp_path / "one")[-1]
    assert 0 < row["train"] < math.log(16) and row["trunk-train"] == pytest.approx(math.log(16), abs=0.05)
    second = train_two_way(data, 8, replace(run, out=tmp_path / "two"), vq, words, saved, stage=2)
    assert all(far > 0 for name, far in moved(state, second).items() if not name.endswith("uncond_embedding"))
    both = log_of(tmp_path / "two")[-1]
    assert both["train"] < row["train"] and both["trunk-train"] == row["trunk-train"]


def test_the_trunk_learns_more_slowly() -> None:
    model = ARLoss(TwoWayLlamaGen(**trunk().config, vertical_layers=1, vertical_start=1, mixing="gate"))

    def rate(name: str) -> float:
        return 1.0 if is_branch(name.removeprefix("gpt."), 2) else TRUNK

    names = {id(p): name.removeprefix("gpt.") for name, p in model.named_parameters()}
    seen: dict[str, float] = {}
    for optimizer in make_optimizers(model, config(Path(), optimizer="muon"), rate):
        for group in optimizer.param_groups:
            seen |= {names[id(p)]: group["rate"] for p in group["params"]}
    assert seen.keys() == set(names.values())
    heads = ("medusa_", "hv_", "layers.2.")
    assert {n for n, share in seen.items() if share == 1} == {n for n in seen if n.startswith(heads)}
    assert {share for n, share in seen.items() if not n.startswith(heads)} == {0.2}


def test_an_interrupted_run_goes_on(words: WordEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, vq = ImageSet(image_folder(tmp_path / "set", 4)), tokenizer()
    whole = train_two_way(data, 8, config(tmp_path / "a", batch=2), vq, words, trunk())
    calls: list[int] = []

    def stops(*args: Any, **more: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return corrupt(*args, **more)

    part = config(tmp_path / "b", batch=2)
    with monkeypatch.context() as patch:
        patch.setattr("visar.training.ar.corrupt", stops)
        with pytest.raises(KeyboardInterrupt):
            train_two_way(data, 8, replace(part, save_minutes=0), vq, words, trunk())
    assert LlamaGen.from_pretrained(tmp_path / "b" / "gpt").config == whole.config  # complete at every moment
    found = train_two_way(data, 8, part, vq, words, trunk())
    assert all(torch.equal(found.state_dict()[k], v) for k, v in whole.state_dict().items())


def test_what_does_not_fit_is_refused(words: WordEncoder, tmp_path: Path) -> None:
    data, vq, run = ImageSet(image_folder(tmp_path / "set", 4)), tokenizer(), config(tmp_path / "run")
    two = TwoWayLlamaGen(**trunk().config, vertical_layers=1, vertical_start=1)
    for start, size, more, message in (
        (trunk(), 8, {"stage": 2}, "has no two-way heads: give --stage 1 first"),
        (two, 8, {}, "has two-way heads already: give --stage 2"),
        (trunk(), 16, {}, "has 4 cells along a side, and the tokenizer, the size or the words have 8"),
        (class_gpt(), 8, {}, "has 24 codes"),
        (trunk(), 8, {"layers": 3}, "has 1 to 2 layers, as the trunk, not 3"),
    ):
        with pytest.raises(VisarError, match=message):
            train_two_way(data, size, run, vq, words, start, **more)
    assert not (tmp_path / "run" / "gpt").exists()


def variants_of(run: Path, data: Path) -> tuple[int, int]:
    """How many images of the groups even and odd a run has varied."""
    tokens = load_file(run / "variants-0.safetensors")["tokens"]
    assert tokens.shape[1:] == (3, 16)
    varied = {r.group: 0 for r in ImageSet(data).records}
    for record, own in zip(ImageSet(data).records, tokens, strict=True):
        varied[record.group] += bool((own[1:] >= 0).any())
    return varied["even"], varied["odd"]


def test_from_a_gpt_to_images(words: WordEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def train(*arguments: object) -> int:
        return main(["train", *map(str, arguments)])

    words.save_pretrained(tmp_path / "words")
    tokenizer().save_pretrained(tmp_path / "vq")
    trunk().save_pretrained(tmp_path / "gpt")
    parts = ("--tokenizer", tmp_path / "vq", "--words", tmp_path / "words")
    common = (
        "two-way", "--data", image_folder(tmp_path / "set", 30), "--size", 8, "--batch", 2, "--minutes", 0.005,
        "--no-compile", *parts,
    )  # fmt: skip
    varied = ("--init", tmp_path / "gpt", "--variants", 3, "--weigh")
    assert train(*common, *varied, "odd=1000,even=0.001", "-o", tmp_path / "one") == 0
    of_evens, of_odds = variants_of(tmp_path / "one", tmp_path / "set")
    assert of_odds > 0 == of_evens  # no even one was taken
    assert train(*common, *varied, "noto=2", "-o", tmp_path / "no") == 2
    assert "No image has the style or group 'noto'" in capsys.readouterr().err
    assert train(*common, "--stage", 2, "--init", tmp_path / "one" / "gpt", "-o", tmp_path / "two") == 0
    rows = [json.loads((tmp_path / run / "log.jsonl").read_text().splitlines()[-1]) for run in ("one", "two")]
    assert len(rows) == 2 and all(math.isfinite(row["loss"]) and "trunk-train" in row for row in rows)
    assert train(*common, "--stage", 2, "--init", tmp_path / "gpt", "-o", tmp_path / "no") == 2
    assert not (tmp_path / "no").exists() and "give --stage 1 first" in capsys.readouterr().err
    assert train(*common, "--stage", 2, "--init", tmp_path / "one" / "gpt", "--layers", 2, "-o", tmp_path / "no") == 2
    assert "--layers are those of stage 1" in capsys.readouterr().err
    ar = ("ar", *common[1:], "--dim", 32, "--layers", 2, "--heads", 2, "--ffn", 32)
    assert train(*ar, "--init", tmp_path / "one" / "gpt", "-o", tmp_path / "ar") == 2
    assert "`visar train two-way` trains them" in capsys.readouterr().err
    made = tmp_path / "made"
    assert train("assemble", "--gpt", tmp_path / "two" / "gpt", *parts, "--out", made) == 0
    index = json.loads((made / "model_index.json").read_text())
    assert index["gpt"] == ["visar.families.llamagen.two_way", "TwoWayLlamaGen"]
    capsys.readouterr()
    assert main(["generate", "red cat", "--model", str(made), "-o", str(tmp_path / "cat.png")]) == 0
    said = capsys.readouterr()
    assert "diagonal (exact for a two-way model, which is another model than its trunk): 8 NFE" in said.out + said.err
    assert main(["bench", "--model", str(made), "-n", "1", "--repeats", "1"]) == 0
    assert "diagonal" in capsys.readouterr().out
    assert train("drafter", "--model", made, "--captions", tmp_path / "set", "-o", tmp_path / "draft") == 2
    assert "takes no drafter" in capsys.readouterr().err and not (tmp_path / "draft" / "images.safetensors").exists()
