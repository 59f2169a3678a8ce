"""Training on a few tiny images: both trainers, the command line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.tiny import image_folder, text_gpt
from tests.helpers.training import config, log_of
from visar.cli import main
from visar.engine.component import WEIGHTS
from visar.errors import VisarError
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.randar import RandAR
from visar.families.llamagen.vq import VQConfig, VQModel
from visar.text_encoders.words import WordEncoder
from visar.training.ar import (
    AnyOrderLoss,
    ARLoss,
    TokenBatches,
    bigram_cross_entropy,
    corrupt,
    cross_entropy,
    initialise,
    random_cells,
    train_ar,
)
from visar.training.data import ImageSet, Record, to_unit
from visar.training.tokenizer import TokenizerLoss, psnr, train_tokenizer

SIZES = VQConfig(16, 4, channels=32, channel_multipliers=(1, 2), res_blocks=1, z_channels=16)
STYLES = ("flat", "glossy", "3d", "noto")


# The tokenizer


def test_train_tokenizer(tmp_path: Path) -> None:
    data = ImageSet(image_folder(tmp_path / "set", 12))
    torch.manual_seed(0)
    untrained = psnr(VQModel(16, 4, 32, (1, 2), 1, 16), data.pixels(8))
    run = config(tmp_path / "run", steps=40, batch=4, lr=3e-3, ema=0.9)
    vq = train_tokenizer(data, 8, run, SIZES)
    loaded = VQModel.from_pretrained(tmp_path / "run" / "vq")
    assert loaded.sizes == SIZES
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in vq.state_dict().items())
    row = log_of(tmp_path / "run")[-1]
    assert math.isfinite(row["loss"]) and row["step"] == 40 and 1 <= row["codes_used"] <= 16
    assert psnr(loaded.eval(), data.pixels(8)) > untrained + 2
    with pytest.raises(VisarError, match="multiple of 2 pixels, not 9"):
        train_tokenizer(data, 9, run, SIZES)
    (run.out / "state.pt").unlink()  # so that it might be anybody's
    with pytest.raises(VisarError, match=r"vq is not of a run that can resume, which has a state\.pt; give another"):
        train_tokenizer(data, 8, run, SIZES)


def test_unused_codes_move_onto_features() -> None:
    torch.manual_seed(0)
    loss = TokenizerLoss(VQModel(16, 4, 32, (1, 2), 1, 16))
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    for _ in range(3):
        loss(pixels)
    used = loss.last_used == 3
    assert 0 < used.sum() < 16
    before = loss.vq.quantize.embedding.weight.detach().clone()
    loss.revive(pixels, idle=3)
    assert torch.equal(loss.vq.quantize.embedding.weight, before)  # none is idle for longer than that
    loss.revive(pixels, idle=2)
    after = loss.vq.quantize.embedding.weight
    assert torch.equal(after[used], before[used]) and not (after[~used] == before[~used]).any()
    features = loss.vq.features(to_unit(pixels)).flatten(0, 2)
    assert (torch.cdist(after[~used], features).amin(1) < 1e-3).all()
    assert (loss.last_used == 3).all()


# The GPT


def test_corruption() -> None:
    tokens = torch.arange(40).expand(2000, -1)
    pool = torch.stack([tokens[0] + 100, tokens[0] + 200])
    out = corrupt(tokens, pool, torch.Generator().manual_seed(0), most=0.5, clean=0.3)
    changed = out != tokens
    assert ((out - tokens)[changed] % 100 == 0).all() and set((out - tokens).unique().tolist()) == {0, 100, 200}
    rate = changed.float().mean(1)
    assert 0.27 < (rate == 0).float().mean() < 0.40  # the clean ones, and those of a rate near 0
    assert abs(rate.mean() - 0.7 * 0.25) < 0.02 and rate.max() < 0.8
    assert torch.equal(corrupt(tokens, pool, torch.Generator(), clean=1.0), tokens)
    assert tokens[:, 0].eq(0).all()


def test_bigram_baseline_by_hand() -> None:
    train, held = torch.tensor([[0, 1, 0, 1]]), torch.tensor([[0, 1, 1]])
    expected = -(math.log(2.1 / 2.2) + math.log(0.1 / 1.2)) / 2  # 0 -> 1 twice, 1 -> 0 once, 1 -> 1 never
    assert bigram_cross_entropy(train, held, 2) == pytest.approx(expected, rel=1e-5)


def test_a_dropped_caption_does_not_matter(words: WordEncoder) -> None:
    torch.manual_seed(0)
    loss = ARLoss(initialise(text_gpt()))
    ids, ones = torch.randint(0, 24, (1, 25)), torch.ones(1, 4, dtype=torch.bool)
    cat, dog = (words.encode([w])[0] for w in ("cat", "dog"))

    def value(features: Tensor, drop: bool) -> float:
        return loss(features, ones, torch.tensor([drop]), ids, ids).item()

    assert value(cat, True) == value(dog, True)
    assert len({value(cat, True), value(cat, False), value(dog, False)}) == 3
    assert value(cat, False) == pytest.approx(math.log(24), abs=0.1)


def test_cross_entropy_does_not_depend_on_the_batch(words: WordEncoder) -> None:
    torch.manual_seed(0)
    gpt, ids = text_gpt(), torch.randint(0, 24, (5, 25))
    records = [Record("", w) for w in ("red", "blue", "cat", "dog", "red cat")]
    whole = cross_entropy(gpt, words, records, ids)
    assert cross_entropy(gpt, words, records, ids, batch=2) == pytest.approx(whole, rel=1e-5)
    assert cross_entropy(gpt, words, records, ids.flip(0)) != pytest.approx(whole, rel=1e-5)


def test_the_loss_of_any_order_by_hand(words: WordEncoder) -> None:
    """Each token is predicted from those before it in the row's own order, which the batch holds."""
    torch.manual_seed(0)
    gpt = initialise(RandAR(**text_gpt().config))
    (features, mask), ids = words.encode(["red", "cat"]), torch.randint(0, 24, (2, 25))
    inputs, cells = torch.randint(0, 24, (2, 25)), random_cells(ids, torch.Generator().manual_seed(0))
    loss = AnyOrderLoss(gpt)(features, mask, torch.tensor([False, False]), inputs, ids, cells).item()
    nats = []
    for b, order in enumerate(cells.tolist()):
        row = torch.tensor([[inputs[b, c] for c in order[:-1]]])
        log_p = gpt(features[b : b + 1], row, mask[b : b + 1], cells[b : b + 1]).log_softmax(-1)[0]
        nats += [-log_p[n, ids[b, c]].item() for n, c in enumerate(order)]
    assert cells[0].tolist() != cells[1].tolist() and loss == pytest.approx(sum(nats) / len(nats), rel=1e-5)


@pytest.mark.filterwarnings("ignore:Words not known")
@pytest.mark.parametrize("any_order", [False, True])
def test_train_ar_learns_two_images(words: WordEncoder, tmp_path: Path, any_order: bool) -> None:
    """A RandAR goes on from a plain GPT, and not the other way round; a resumed run has the same orders."""
    data = ImageSet(image_folder(tmp_path / "set", 2))
    torch.manual_seed(0)
    vq = VQModel(16, 4, 32, (1, 2), 1, 16).eval()
    run = config(tmp_path / "run", steps=60, batch=8, lr=1e-2, ema=0.9, optimizer="muon")
    sizes: dict[str, Any] = {"dim": 32, "layers": 1, "heads": 2, "ffn": 32}
    start = train_ar(data, 8, replace(run, out=tmp_path / "first", steps=1), vq, words, **sizes) if any_order else None
    gpt = train_ar(data, 8, run, vq, words, **sizes, start=start, any_order=any_order)
    if any_order:
        batches = [TokenBatches(data, 8, run, vq, words, any_order=True)(3, 0) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
        with pytest.raises(VisarError, match="samples in any order: --any-order goes on"):
            train_ar(data, 8, run, vq, words, **sizes, start=gpt)
    loaded = (RandAR if any_order else LlamaGen).from_pretrained(tmp_path / "run" / "gpt")
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in gpt.state_dict().items())
    assert (loaded.config.grid, loaded.config.vocab_size, loaded.config.condition_length) == (4, 16, 4)
    row = log_of(tmp_path / "run")[-1]
    assert math.isfinite(row["loss"]) and row["train"] < 0.5 * math.log(16)
    with pytest.raises(VisarError, match="multiple of 2 pixels, not 9"):
        train_ar(data, 9, run, vq, words)
    (run.out / "state.pt").unlink()  # so that it might be anybody's
    with pytest.raises(VisarError, match=r"gpt is not of a run that can resume, which has a state\.pt; give another"):
        train_ar(data, 8, run, vq, words)


# The command line


@pytest.mark.filterwarnings("ignore:Words not known")
def test_from_images_to_a_pipeline(words: WordEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def train(*arguments: object) -> int:
        return main(["train", *(str(a) for a in arguments)])

    data = image_folder(tmp_path / "set", 30, ("flat", "noto"))
    words.save_pretrained(tmp_path / "words")
    common = ("--data", data, "--size", 16, "--batch", 2, "--minutes", 0.02, "--no-compile", "--device", "cpu")
    assert train("tokenizer", *common, "--out", tmp_path / "vq") == 0
    parts = ("--tokenizer", tmp_path / "vq" / "vq", "--words", tmp_path / "words")
    sizes = ("--dim", 32, "--layers", 1, "--heads", 2, "--ffn", 32)
    assert train("ar", *common, *parts, *sizes, "--styles", "noto", "--out", tmp_path / "ar") == 0
    out, err = capsys.readouterr()
    state = (tmp_path / "ar" / "state.pt").read_bytes()
    mine = ("ar", "--data", data, *parts, *sizes, "--size", 16, "--no-compile", "--out", tmp_path / "ar")
    for other, message in (
        (("--styles", "noto", "--seed", 1), "seed was 0, now 1; give another folder, or"),
        (("--init", tmp_path / "ar" / "gpt"), "data was "),
    ):
        assert train(*mine, *other) == 2 and message in capsys.readouterr().err
    assert (tmp_path / "ar" / "state.pt").read_bytes() == state
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 2 and all(math.isfinite(r["loss"]) and r["step"] > 0 for r in rows)
    assert "60 images" in err and "30 images" in err
    (tmp_path / "ar" / "state.pt").rename(tmp_path / "elsewhere")  # so that it might be anybody's GPT
    before = (tmp_path / "ar" / "gpt" / WEIGHTS).read_bytes()
    assert train(*mine, "--styles", "noto") == 2
    assert "gpt is not of a run that can resume, which has a state.pt; give" in capsys.readouterr().err
    assert (tmp_path / "ar" / "gpt" / WEIGHTS).read_bytes() == before
    small = "--gpt-dtype", "float8_e4m3fn"
    assert train("assemble", "--gpt", tmp_path / "ar" / "gpt", *parts, *small, "--out", tmp_path / "pipe") == 0
    kept = {name: {t.dtype for t in load_file(tmp_path / "pipe" / name / WEIGHTS).values()} for name in ("gpt", "vq")}
    assert kept == {"gpt": {torch.float8_e4m3fn}, "vq": {torch.float16}}
    assert capsys.readouterr() == (f"{tmp_path / 'pipe'}\n", "")
    assert "/" not in (tmp_path / "pipe" / "vq" / "config.json").read_text()  # no path of this machine
    for again in (("assemble", "--gpt", tmp_path / "ar" / "gpt", *parts), ("words", "--data", data)):
        assert train(*again, "--out", tmp_path / "pipe") == 2
        assert capsys.readouterr().err.endswith("pipe exists: give a folder that is new or empty.\n")
    assert main(["generate", "red cat", "--model", str(tmp_path / "pipe"), "-o", str(tmp_path / "cat.png")]) == 0
    assert Image.open(tmp_path / "cat.png").size == (16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("tokenizer --data TMP/none --out TMP/out", "No image folder at"),
        ("tokenizer --data TMP/set --out TMP/file/out", "Cannot write to folder"),
        ("tokenizer --data TMP/set --out TMP/made", "vq is not of a run that can resume, which has a state.pt; give"),
        ("tokenizer --data TMP/set --out TMP/out --minutes 0", "--minutes must be above 0"),
        ("tokenizer --data TMP/set --out TMP/out --size 18", "multiple of 4 pixels, not 18"),
        ("tokenizer --data TMP/set --out TMP/out --styles oil", "No image has style 'oil'"),
        ("tokenizer --data TMP/set --out TMP/out --device cuda:99", "Device 'cuda:99' is not there"),
        ("ar --data TMP/set --out TMP/out --tokenizer TMP/set --words TMP/set", "it has no config.json"),
        ("ar --data TMP/set --out TMP/out --tokenizer x --words x --dim 30", "--dim must be a multiple of --heads"),
        ("assemble --mar x --autoencoder x --words x --gpt-dtype float16 --out TMP/out", "--gpt-dtype with --gpt"),
        ("assemble --gpt x --tokenizer x --words x --draft-dtype float16 --out TMP/out", "--draft, which is not given"),
        ("assemble --gpt TMP/set --tokenizer x --words x --out TMP/out", "set is not a saved component"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    image_folder(tmp_path / "set", 3)
    (tmp_path / "file").touch()
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "vq").touch()
    assert main(["train", *arguments.replace("TMP", str(tmp_path)).split()]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "images, " not in line]
    assert len(lines) == 1 and lines[0].startswith("visar: error: ") and message in lines[0]
