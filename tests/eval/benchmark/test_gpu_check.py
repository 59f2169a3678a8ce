"""The script of all GPU checks, run on the CPU: every section gives rows, and one that breaks hides no other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from visar.eval.benchmark import decoder_shapes, gpu_check, kernel_checks, shapes, speed
from visar.eval.benchmark.gpu_check import Check, Run, carry_out, main, report_text
from visar.eval.benchmark.kernel_checks import TINY, Case, cases
from visar.eval.benchmark.kernel_checks import run as run_case
from visar.kernels.backend import triton

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(triton is None, reason="torch brings Triton where it has GPU backends only")
Capture = pytest.CaptureFixture[str]


# The invariant mode under Triton's interpreter is nearly all of it; `tests/kernels/test_invariant.py` has its kernels.
@pytest.mark.parametrize("without", ["invariant", pytest.param("", marks=pytest.mark.slow)])
def test_dry_run(without: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    sections = {name: section for name, section in gpu_check.SECTIONS.items() if name != without}
    monkeypatch.setattr(gpu_check, "SECTIONS", sections)
    path = tmp_path / "new" / "gpu.json"
    for module in (gpu_check, shapes, speed):
        monkeypatch.setattr(module, "bandwidth", lambda *_: 20.0)  # a large copy, again and again
    if triton is not None:  # all of them are run by the test below
        few = [c for c in cases(TINY, CPU, torch.float32) if c.name in ("draw", "guidance")]
        monkeypatch.setattr(kernel_checks, "cases", lambda *_: iter(few))
    assert main(["--dry-run", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "FAILED" not in out.replace(" 0 FAILED.", "") and "dry run: results mean nothing" in out
    assert "Random weights" in out and "WAITS/PASS" in out
    found = json.loads(path.read_text())
    assert list(found["checks"]) == list(gpu_check.SECTIONS)
    assert all(found["checks"].values()) and found["dry_run"]
    assert not [c for checks in found["checks"].values() for c in checks if c["good"] is False]
    assert {p.partition(",")[0] for p in found["profiles"]} == {"ar", "scd"}
    assert [(r["name"], r["batch"]) for r in found["shapes"]["rows"]] == [
        ("tiny", 1), ("tiny-janus", 1), ("tiny", 2), ("tiny-text", 1), ("tiny-text", 2), ("tiny-int8", 1),
    ]  # fmt: skip


def test_every_default_shape_is_among_the_rows() -> None:
    rows = [*gpu_check.FIRST_SHAPES, *gpu_check.OTHER_SHAPES]
    assert len(set(rows)) == len(rows) and {(name, 1) for name in shapes.DEFAULTS["cuda"]} <= set(rows)
    assert {name for name, _ in rows} <= set(shapes.SHAPES)


@needs_triton
@pytest.mark.parametrize("case", cases(TINY, CPU, torch.float32) if triton else (), ids=lambda c: c.name)
def test_every_kernel(case: Case) -> None:
    found = run_case(case, TINY, CPU, 1)
    assert found.same and found.microseconds > 0
    assert found.gb_per_second == pytest.approx(case.moved / found.microseconds / 1e3)


@needs_triton
def test_every_kernel_is_among_the_checks() -> None:
    """A kernel that is launched somewhere and checked nowhere here was forgotten."""
    import visar.kernels

    folder = Path(visar.kernels.__file__).parent
    others = {"philox", "invariant"}  # checked with the noise, and with the product
    files = {p.stem for p in folder.glob("*.py") if "_triton(" in p.read_text()} - others
    text = Path(kernel_checks.__file__).read_text()
    assert {f for f in files if f"visar.kernels.{f} import" not in text} == set()


def test_what_differs_is_seen() -> None:
    good = torch.arange(6.0)

    def outcome(wrong: torch.Tensor, tolerance: float = 1e-4) -> bool:
        return run_case(Case("x", lambda i: wrong, 8, tolerance, lambda i: good), TINY, CPU, 1).same

    assert outcome(good) and outcome(good + 1e-6)
    assert not outcome(good + 1e-3) and not outcome(good[:5]) and not outcome(good / good)
    tokens = torch.arange(8)
    assert not run_case(Case("x", lambda i: tokens + (tokens == 3), 8, 0.01, lambda i: tokens), TINY, CPU, 1).same


@needs_triton
def test_a_cache_that_is_not_written_is_seen() -> None:
    case = next(c for c in cases(TINY, CPU, torch.float32) if c.name.startswith("rotary"))

    def idle(i: int) -> object:
        q, keys, values = case.call(i)
        case.before(i)
        return q, keys, values

    broken = Case(case.name, idle, case.moved, case.tolerance, case.call, case.before)
    assert not run_case(broken, TINY, CPU, 1).same


def test_a_broken_section_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(run: Run) -> Iterator[Check]:
        yield Check("first", "fine", True)
        raise RuntimeError("no such kernel")

    def works(run: Run) -> Iterator[Check]:
        yield Check("second", "fine", True)

    monkeypatch.setattr(gpu_check, "SECTIONS", {"a": breaks, "b": works})
    run = Run(CPU, True)
    rows = carry_out(run)
    assert [[c.good for c in checks] for checks in rows.values()] == [[True, False], [True]]
    text = report_text(run, rows)
    assert "RuntimeError: no such kernel" in text and text.endswith("2 checks passed, 1 FAILED.")
    assert main(["--dry-run"]) == 1


def test_a_broken_check_hides_none_beside_it() -> None:
    def check(n: int) -> Check:
        if n == 1:
            raise RuntimeError("no such kernel")
        return Check(f"check {n}", "fine", True)

    found = list(gpu_check.each(((f"item {n}", n) for n in range(3)), check))
    assert [(c.name, c.good) for c in found] == [("check 0", True), ("item 1", False), ("check 2", True)]
    assert found[1].result == "RuntimeError: no such kernel"


def test_a_stock_loop_that_fails_leaves_its_shape_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> float:
        raise TypeError("missing 1 required positional argument")

    shape = gpu_check.TINY_FIRST[1][0]
    monkeypatch.setattr(decoder_shapes, "generate", fails)
    monkeypatch.setattr(shapes, "bandwidth", lambda *_: 20.0)
    report = shapes.measure([shape], batches=(1,), dtypes=(torch.bfloat16,), windows=(1,), repeats=2, passes=2)
    row = report.rows[0]
    assert row.ms_per_pass[1] > 0 and row.stock_ms is None and row.stock_ratio is None
    assert row.note == "tiny-janus: transformers failed: TypeError: missing 1 required positional argument"
    assert row.note in shapes.shapes_text(report)


def test_sections_by_name(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def works(run: Run) -> Iterator[Check]:
        yield Check("only", "fine", True)

    monkeypatch.setattr(gpu_check, "SECTIONS", {"a": works, "b": works})
    assert main(["--dry-run", "--sections", "b"]) == 0
    assert capsys.readouterr().out.count("only") == 1
    assert main(["--dry-run", "--sections", "b,c"]) == 2
    assert capsys.readouterr().err == "visar: error: there is no section 'c'; there are a, b.\n"


def test_what_is_out_of_time_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(gpu_check.time, "perf_counter", lambda: now[0])

    def slow(run: Run) -> Iterator[Check]:
        for n in range(5):
            now[0] += 40
            yield Check(f"check {n}", "fine", True)

    monkeypatch.setattr(gpu_check, "SECTIONS", {"a": slow, "b": slow})
    rows = carry_out(Run(CPU, True), seconds=100)
    assert [c.name for c in rows["a"]] == ["check 0", "check 1", "check 2", "a"]
    assert [(c.result, c.good) for c in rows["b"]] == [("the rest was left out after 100 s", None)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: Capture) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err == "visar: error: there is no CUDA device here; nothing was checked.\n"
