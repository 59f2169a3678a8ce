"""`visar bench --shapes` on small shapes: what is counted, what is measured, and what is said where memory is short."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from visar.cli import main
from visar.engine.guidance import Guidance
from visar.engine.memory import free_memory
from visar.errors import VisarError
from visar.eval.benchmark import shapes
from visar.eval.benchmark.llamagen_shapes import LlamaGenShape, condition_of, published
from visar.eval.benchmark.shapes import SHAPES, measure, shape_named
from visar.families.llamagen.session import LlamaGenSession
from visar.families.llamagen.specs import GPTShape

CPU = torch.device("cpu")
CLASS = LlamaGenShape("tiny", GPTShape(2, 64, 2, 96, vocab=128, classes=5), "class", 6, 4.0, 10)
TEXT = LlamaGenShape("tiny-text", GPTShape(2, 64, 2, 96, 6, 128, 5, 8), "text", 4, 4.0, 10)
GPTS = published()
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def small_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "bandwidth", lambda device: 20.0)


def test_shapes_have_the_published_sizes() -> None:
    """Counts of weights and bytes are those of the paper's models, one by one."""
    published = {"B-256": 110_888_448, "L-384": 342_910_976, "XL-384": 774_699_520, "XXL-384": 1_410_972_672,
                 "3B-384": 3_096_659_200}  # fmt: skip
    assert {n: SHAPES[n].parameters for n in published} == published
    assert SHAPES["XL-512"].parameters == 777_678_080 + 120 * 2048  # and the buffer of the empty caption
    assert SHAPES["XL-384"].cache(1, 1) * 2 == 184_320 and SHAPES["3B-384"].cache(1, 1) * 2 == 307_200
    assert (GPTS["XL-512"].grid, GPTS["XL-512"].condition, GPTS["XL-384"].condition) == (32, "text", "class")
    # XL-384: 0.752 B streamed weights, and 0.11 GB of cache for both halves.
    assert SHAPES["XL-384"].streamed(1, torch.bfloat16) / 1e9 == pytest.approx(1.50 + 0.11, abs=0.015)


@pytest.mark.parametrize("shape", [CLASS, TEXT], ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_are_those_of_the_model(shape: LlamaGenShape, dtype: torch.dtype) -> None:
    model = shape.make(dtype, CPU)
    state = dict(model.state_dict())
    assert sum(t.numel() for t in state.values()) == shape.parameters
    assert {t.dtype for t in state.values()} == {dtype} and torch.get_default_dtype() == torch.float32
    assert sum(t.numel() for n, t in state.items() if "embedding" not in n) == shape.weights
    condition, mask = condition_of(shape, 3)
    length, window = shape.grid**2, 4
    session = LlamaGenSession(model, condition, mask, length=length, window=window, guidance=Guidance(2.0))
    cache = sum(t.numel() for t in (session.cache.keys, session.cache.values))
    assert 0 <= shape.cache(6, shape.gpt.condition_length + length + window) - cache <= shape.cache(6, 12)
    with torch.inference_mode():
        logits = session.forward(torch.zeros(3, window, dtype=torch.long))
    assert logits.isfinite().all() and 0.01 < logits.std() < 20


@pytest.mark.parametrize("shape", [CLASS, TEXT], ids=lambda s: s.name)
def test_rows(shape: LlamaGenShape) -> None:
    report = measure([shape], windows=(4,), batches=(1, 2), repeats=3, passes=2, dtypes=(torch.float32,))
    assert [(r.name, r.batch, r.dtype, r.tokens) for r in report.rows] == [
        (shape.name, b, "float32", shape.grid**2) for b in (1, 2)
    ]
    assert report.weights == "random" and report.bandwidth == 20.0
    for r in report.rows:
        assert list(r.ms_per_pass) == [1, 4] and min(r.ms_per_pass.values()) > 0 and r.note == ""
        assert r.streamed_gb == shape.streamed(r.batch, torch.float32) / 1e9
        assert r.of_bandwidth[4] == pytest.approx(r.streamed_gb / (r.ms_per_pass[4] / 1e3) / 20)
        assert r.seconds_per_image == pytest.approx(r.ms_per_pass[1] / 1e3 * r.tokens / r.batch)
        assert r.stock_ms and r.stock_ratio == pytest.approx(r.stock_ms / r.ms_per_pass[1])
        assert r.stock_tokens_per_second == pytest.approx(1e3 * r.batch / r.stock_ms)
        assert (r.peak_gib, r.capture_seconds) == (None, {})  # a GPU's
        assert {w: p.sampler for w, p in r.profiles.items()} == {1: "ar", 4: "scd"}


def test_medians_of_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([9.0, 1.0, 3.0])
    monkeypatch.setattr(shapes, "steady", lambda *_, **__: shapes.Steady(next(times), 1, 0.5))
    monkeypatch.setattr(shapes, "profile_passes", lambda *_, **__: None)
    row = measure([CLASS], windows=(), repeats=3, passes=1, dtypes=(torch.float32,)).rows[0]
    assert row.ms_per_pass == {1: 3.0} and row.capture_seconds == {1: 0.5}


def test_what_is_needed_grows_with_what_is_asked() -> None:
    xl, bf16, cuda = SHAPES["XL-384"], torch.bfloat16, torch.device("cuda")
    base = xl.needed(1, 16, bf16, cuda)
    assert base > 2 * xl.parameters and xl.needed(8, 16, bf16, cuda) > base < xl.needed(1, 64, bf16, cuda)
    assert xl.needed(1, 16, torch.float32, cuda) > 1.9 * base
    assert xl.needed(1, 16, bf16, CPU) == base + 2 * xl.weights  # weights in the processor's own order


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """An asked-for shape is an error that says what fits; one of the default rows is a line, and the others are run."""
    fp32 = (torch.float32,)
    needed = {b: CLASS.needed(b, 4, torch.float32, CPU) for b in (3, 4)}
    monkeypatch.setattr(shapes, "free_memory", lambda device: needed[3])
    with pytest.raises(VisarError, match=r"tiny at batch 4 in float32 needs 0\.0 GiB.*are free on cpu; batch 3 fits\."):
        measure([CLASS], batches=(4,), windows=(4,), dtypes=fp32)
    monkeypatch.setattr(shapes, "free_memory", lambda device: 2**30)
    with pytest.raises(VisarError, match=r"XL-384 .* needs [67]\.\d GiB, 1\.0 GiB are free on cpu; what fits: B-256"):
        measure([SHAPES["XL-384"]], dtypes=fp32)
    monkeypatch.setattr(shapes, "free_memory", lambda device: 2**20)
    with pytest.raises(VisarError, match="what fits: no published shape"):
        measure([SHAPES["B-256"]], dtypes=fp32)
    monkeypatch.setitem(shapes.SHAPES, "tiny", CLASS)
    monkeypatch.setitem(shapes.DEFAULTS, "cpu", ("tiny", "B-256"))
    monkeypatch.setattr(shapes, "free_memory", lambda device: 2**24)
    rows = measure(windows=(4,), repeats=1, passes=1).rows
    assert [(r.name, r.dtype, bool(r.ms_per_pass)) for r in rows] == [
        ("tiny", "bfloat16", True),
        ("tiny", "float32", True),
        ("B-256", "bfloat16", False),
        ("B-256", "float32", False),
    ]
    assert rows[2].note.startswith("B-256 at batch 1 in bfloat16 needs 0.") and not rows[0].note


def test_free_memory_is_that_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**26 < free_memory(CPU) <= total
    monkeypatch.setattr(Path, "read_text", lambda self, **_: "")  # where there is no such file
    assert free_memory(CPU) == total


def test_command(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    short = replace(GPTS["3B-384"], name="big")
    monkeypatch.setattr(shapes, "SHAPES", {"tiny": CLASS, "big": short})
    monkeypatch.setattr(shapes, "DEFAULTS", {"cpu": ("tiny", "big")})
    monkeypatch.setattr(shapes, "free_memory", lambda device: 2**28)
    path = tmp_path / "new" / "shapes.json"
    assert main(["bench", "--shapes", "--device", "cpu", "--window", "4", "--repeats", "1", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].split()[:7] == ["SHAPE", "DTYPE", "BATCH", "MS/PASS", "W=1", "MS/PASS", "W=4"]
    assert [line.split()[:3] for line in lines[1:5]] == [
        [n, d, "1"] for n in ("tiny", "big") for d in ("bfloat16", "float32")
    ]
    assert "big at batch 1 in bfloat16 needs" in lines[5] and lines[-1].startswith("Random weights of the published")
    found = json.loads(path.read_text())
    assert found["weights"] == "random" and {r["weights"] for r in found["rows"]} == {"random"}
    assert [sorted(r["ms_per_pass"]) for r in found["rows"]] == [["1", "4"], ["1", "4"], [], []]
    assert found["rows"][0]["profiles"]["4"]["shares"]["gemm"] > 0
    asked = ["bench", "--shapes", "TINY", "--device", "cpu", "--dtype", "float32", "--batch", "2", "--repeats", "1"]
    assert main([*asked, "--window", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["tiny", "float32", "2"]


def test_profile_command(text_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "profile.json"
    assert main(["bench", "--profile", "--model", str(text_folder), "--samplers", "ar,scd", "--window", "4", "--json",
                 str(path)]) == 0  # fmt: skip
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split()[:4] == ["SAMPLER", "W", "MS/PASS", "ATTENTION"] and "WAITS/PASS" in lines[0] and err == ""
    assert [line.split()[:2] for line in lines[1:]] == [["ar", "1"], ["scd", "4"]]
    rows = json.loads(path.read_text())["rows"]
    assert sum(rows["scd"]["shares"].values()) == pytest.approx(1) and rows["ar"]["launches"] > 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--shapes XL-385", "Unknown shape 'XL-385'. Did you mean 'XL-384'?"),
        ("--shapes B-256,nonsense", "Unknown shape 'nonsense'"),
        ("--shapes --window 129", "A pass takes 1 to 128 tokens, not 129."),
        ("--shapes --window 0", "A pass takes 1 to 128 tokens, not 0."),
        ("--shapes --batch 0", "--batch must be 1 or more, not 0."),
        ("--shapes --batch -3", "--batch must be 1 or more, not -3."),
        ("--shapes --repeats 0", "--repeats must be 1 or more"),
        ("--shapes --samplers sjd", "--shapes measures ar and scd with random weights"),
        ("--shapes B-256 --batch 100000", "are free on cpu; batch "),
        ("--shapes --device cuda:99", "Device 'cuda:99' is not there"),
        ("--shapes --json FILE/report.json", "Cannot write to folder"),
        ("--profile --samplers arr", "Unknown sampler 'arr'"),
        ("--profile --batch 2", "--profile is of one image"),
        ("--profile --samplers ,", "No sampler was given"),
    ],
)
def test_bad_input_is_one_line(
    arguments: str, message: str, text_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "FILE").touch()
    words = arguments.replace("FILE", str(tmp_path / "FILE")).split()
    words += ["--model", str(text_folder)] if "--profile" in words else []
    words += [] if "--device" in words else ["--device", "cpu"]
    assert main(["bench", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_names_in_any_case() -> None:
    assert shape_named("xl-512") is SHAPES["XL-512"]
    assert main(["bench", "--shapes", "--profile"]) == 2
