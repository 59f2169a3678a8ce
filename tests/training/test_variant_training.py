"""Training the GPT on variants: going on from saved weights, weights of styles, the list of what is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.tiny import image_folder, text_gpt
from tests.helpers.training import config, log_of
from visar.cli import main
from visar.errors import VisarError
from visar.families.llamagen.gpt import LlamaGen, attended
from visar.families.llamagen.vq import VQModel
from visar.text_encoders.concepts import concepts
from visar.text_encoders.words import WordEncoder
from visar.training.ar import continued, train_ar
from visar.training.data import ImageSet, Record
from visar.training.loop import TrainConfig

SIZES = {"dim": 32, "layers": 1, "heads": 2, "ffn": 32}


def tokenizer() -> VQModel:
    torch.manual_seed(0)
    return VQModel(16, 4, 32, (1, 2), 1, 16).eval()


@pytest.mark.filterwarnings("ignore:Words not known")
def test_variants_are_learnt_and_training_goes_on(words: WordEncoder, tmp_path: Path) -> None:
    data, vq = ImageSet(image_folder(tmp_path / "set", 2)), tokenizer()
    run = config(tmp_path / "a", steps=60, batch=8, lr=1e-2, ema=0.9, optimizer="muon")
    first = train_ar(data, 8, run, vq, words, **SIZES, variants=3)
    assert log_of(tmp_path / "a")[-1]["train"] < 0.6 * 2.77  # of ln 16
    assert (tmp_path / "a" / "variants-0.safetensors").exists()
    saved = LlamaGen.from_pretrained(tmp_path / "a" / "gpt")
    same = TrainConfig(tmp_path / "b", minutes=1e9, steps=1, batch=2, lr=1e-9, warmup=2, compile=False)
    second = train_ar(data, 8, same, vq, words, **SIZES, variants=3, start=saved)
    for k, v in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[k], v, rtol=0, atol=1e-6)
    with pytest.raises(VisarError, match="other sizes: ffn 32 instead of 48"):
        train_ar(data, 8, same, vq, words, **(SIZES | {"ffn": 48}), start=saved)


def test_a_model_grows_by_layers_that_add_nothing_at_first() -> None:
    torch.manual_seed(0)
    small = text_gpt()
    fresh = LlamaGen(**small.config.replace(num_layers=small.config.num_layers + 2))
    grown = continued(small, fresh)
    features, ids = torch.randn(2, 4, 6), torch.randint(0, 24, (2, 5))
    assert len(grown.layers) == len(small.layers) + 2 and torch.equal(grown(features, ids), small(features, ids))
    grown(features, ids).sin().sum().backward()
    last = grown.layers[-1]
    assert last.attention.wo.weight.grad.abs().sum() > 0 and last.feed_forward.w2.weight.grad.abs().sum() > 0
    with pytest.raises(VisarError, match="layers, more than"):
        continued(grown, text_gpt())


@pytest.mark.filterwarnings("ignore:Words not known")
def test_held_out_figures_stand_beside_a_bigram(words: WordEncoder, tmp_path: Path) -> None:
    data = ImageSet(image_folder(tmp_path / "set", 60, ("flat", "noto")))
    train_ar(data, 8, config(tmp_path / "a", steps=1, batch=2), tokenizer(), words, **SIZES, variants=2)
    row = log_of(tmp_path / "a")[-1]
    assert {"train", "unseen-concept", "bigram-unseen-concept"} <= row.keys() and 0 < row["bigram-unseen-concept"] < 10
    known = concepts(tmp_path / "a")
    held = {data.records[i].caption for i in data.indices("unseen-concept")}
    assert known.styles == ["flat", "noto"]
    assert set(known.names()) == {data.records[i].caption for i in data.indices("train")} and held


def test_weights_of_styles_and_groups(tmp_path: Path) -> None:
    data = ImageSet(image_folder(tmp_path / "set", 4, ("flat", "noto")))
    data.records = [
        Record(r.file, r.caption, r.style, group="food" if i < 2 else "") for i, r in enumerate(data.records)
    ]
    shares = data.shares({"noto": 0.5, "food": 0.25})
    wanted = [(0.5 if r.style == "noto" else 1) * (0.25 if r.group else 1) for r in data.records]
    assert shares == wanted and len(set(shares)) >= 3
    for weights, message in (({"oil": 1.0}, "No image has the style or group 'oil'"), ({"noto": -1.0}, "0 or more")):
        with pytest.raises(VisarError, match=message):
            data.shares(weights)
    with pytest.raises(VisarError, match="no image is left"):
        data.shares({"noto": 0.0, "flat": 0.0})


@pytest.mark.filterwarnings("ignore:Words not known")
def test_a_style_of_weight_0_is_never_taken(words: WordEncoder, tmp_path: Path) -> None:
    data = ImageSet(image_folder(tmp_path / "set", 8, ("flat", "noto")))
    run = config(tmp_path / "a", steps=20, batch=8)
    train_ar(data, 8, run, tokenizer(), words, **SIZES, variants=3, weights={"noto": 0})
    from safetensors.torch import load_file

    used = (load_file(tmp_path / "a" / "variants-0.safetensors")["tokens"][:, 1:, 0] >= 0).any(1).tolist()
    for taken, record, split in zip(used, data.records, data.splits, strict=True):
        assert taken == (record.style == "flat" and split == "train")


def test_attention_with_a_gradient_is_the_same() -> None:
    g = torch.Generator().manual_seed(0)
    whole = [torch.randn(2, 3, 7, 4, generator=g) for _ in range(3)]
    mask = torch.zeros(2, 1, 7, 7).masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), -torch.inf)
    fine, coarse = ([x.to(t).requires_grad_() for x in whole] for t in (torch.float32, torch.bfloat16))
    wanted, got = F.scaled_dot_product_attention(*fine, attn_mask=mask), attended(*coarse, mask.bfloat16())
    assert "Attention" not in type(got.grad_fn).__name__ and "Attention" in type(attended(*fine, mask).grad_fn).__name__
    torch.testing.assert_close(got.float(), wanted, rtol=0, atol=0.03)
    ours, theirs = (torch.autograd.grad(x.sin().sum(), of) for x, of in ((got, coarse), (wanted, fine)))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0, atol=0.05)


def test_padded_captions_with_a_gradient() -> None:
    torch.manual_seed(0)
    gpt = text_gpt()
    features, ids = torch.randn(2, 4, 6), torch.randint(0, 24, (2, 5))
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    with torch.no_grad():
        wanted = gpt(features, ids, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gpt(features, ids, mask)
    assert got.requires_grad
    torch.testing.assert_close(got.detach().float(), wanted, rtol=0, atol=0.05)


@pytest.mark.filterwarnings("ignore:Words not known")
def test_the_command(words: WordEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = image_folder(tmp_path / "set", 30, ("flat", "noto"), size=16)
    words.save_pretrained(tmp_path / "words")
    tokenizer().save_pretrained(tmp_path / "vq")
    common = ["--data", data, "--size", 16, "--batch", 2, "--minutes", 0.01, "--no-compile", "--device", "cpu"]
    parts = ["--tokenizer", tmp_path / "vq", "--words", tmp_path / "words", "--variants", 2]
    sizes = ["--dim", 32, "--layers", 1, "--heads", 2, "--ffn", 32]

    def ar(*more: object) -> int:
        return main(["train", "ar", *(str(a) for a in (*common, *parts, *sizes, *more))])

    assert ar("--out", tmp_path / "a", "--weigh", "noto=0.5,flat=2") == 0
    assert ar("--out", tmp_path / "b", "--init", tmp_path / "a" / "gpt") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2 and (tmp_path / "b" / "gpt" / "config.json").exists()
    assert ar("--out", tmp_path / "c", "--variants", -1) == 2
    assert ar("--out", tmp_path / "c", "--weigh", "oil=1") == 2
    assert "No image has the style or group 'oil'" in capsys.readouterr().err
    assert ar("--out", tmp_path / "c", "--weigh", "noto=much") == 2
    assert "--weigh must be NAME=WEIGHT" in capsys.readouterr().err
