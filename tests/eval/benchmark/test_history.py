"""The history of benchmark runs: what a line holds, which runs compare, and the command's two options."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import visar
from visar.cli import main
from visar.errors import VisarError
from visar.eval.benchmark import history
from visar.eval.benchmark.speed import SpeedReport, SpeedRow

Capture = pytest.CaptureFixture[str]


def report(**changes: Any) -> SpeedReport:
    row = SpeedRow("ar", True, 1, 256.0, 1.0, 2.0, 0.0, 0.5, 2.0, 10.0, 1.0, 1.0)
    return replace(SpeedReport("CPU", "float32", "2.9.0", 1, 1, 4, 3, 20.0, [row]), **changes)


def test_a_line_has_all_of_a_run_and_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    runs = [history.run_of(report(batch=b), {"model": "icons", "top_k": None, "parameters": []}) for b in (1, 2)]
    for run in runs:
        history.append(file, run)
    assert history.load(file) == runs and len(file.read_text().splitlines()) == 2
    first = json.loads(file.read_text().splitlines()[0])
    assert first["version"] == visar.__version__ and first["settings"] == {"model": "icons"}
    assert first["date"].endswith("+00:00") and first["report"] == asdict(report())


def test_the_commit_is_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "visar"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setattr(visar, "__file__", str(package / "__init__.py"))
    assert history.run_of(report(), {}).commit is None

    def git(*arguments: str, folder: Path = tmp_path) -> str:
        command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert history.run_of(report(), {}).commit == head
    (package / "__init__.py").write_text("changed")
    assert history.run_of(report(), {}).commit == f"{head}-dirty"
    nested = tmp_path / "env" / "visar"  # installed in an environment within somebody's repository
    nested.mkdir(parents=True)
    monkeypatch.setattr(visar, "__file__", str(nested / "__init__.py"))
    assert history.run_of(report(), {}).commit is None


@pytest.mark.parametrize(
    "changes", [{"device": "H100"}, {"dtype": "bfloat16"}, {"threads": 2}, {"batch": 2}, {"images": 8}]
)
def test_runs_of_another_machine_or_size_do_not_compare(changes: dict[str, Any]) -> None:
    new = history.run_of(report(), {"model": "icons"})
    assert history.comparable(new, history.run_of(report(torch="2.8", bandwidth=1.0), {"model": "icons"}))
    other = history.run_of(report(**changes), {"model": "icons"})
    assert not history.comparable(new, other)
    assert not history.comparable(new, history.run_of(report(), {"model": "icons", "top_k": 5}))
    none = "None of 1 earlier runs is comparable: none has the same settings on CPU, float32, 1 threads, batch 1, 4 im"
    assert history.comparison(new, [other]).startswith(none)


def test_ratios_are_to_the_last_comparable_run() -> None:
    row = report().rows[0]
    slow = report(rows=[replace(row, ms_per_pass=8.0)])
    last = report(rows=[replace(row, nfe=128.0, ms_per_pass=4.0, seconds_per_image=2.0)], bandwidth=40.0, torch="2.8.0")
    runs = [history.run_of(r, {}) for r in (slow, last, report(batch=2))]
    new = history.run_of(report(rows=[row, replace(row, sampler="scd")]), {})
    text = history.comparison(new, runs)
    assert "\nar       2.00  0.50     0.25\n" in text and runs[1].date in text
    assert "did not measure scd" in text and "PyTorch was 2.8.0 and is 2.9.0" in text and "copy: 0.50 of" in text
    assert "It has none of these samplers" in history.comparison(
        history.run_of(report(rows=[replace(row, sampler="sjd")]), {}), runs
    )


@pytest.mark.parametrize(
    "line", ["no json", "[]", "{}", '{"date": "", "version": "", "commit": null, "settings": {}, "report": {}}']
)
def test_another_file_is_an_error(tmp_path: Path, line: str) -> None:
    file = tmp_path / "runs.jsonl"
    history.append(file, history.run_of(report(), {}))
    with file.open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(VisarError, match=r"^Line 2 of .*runs\.jsonl: (it|report) (is not valid|should be|has no)"):
        history.load(file)
    with pytest.raises(VisarError, match=r"There is no .*none\.jsonl"):
        history.load(tmp_path / "none.jsonl")


def test_the_command(text_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "runs.jsonl"
    given = ["bench", "--model", str(text_folder), "--samplers", "ar", "-n", "1", "--repeats", "1"]
    assert main([*given, "--history", str(file), "--against", str(file)]) == 0
    assert "None of 0 earlier runs is comparable" in capsys.readouterr().out
    assert main([*given, "--history", str(file), "--against", str(file)]) == 0
    assert "\nar       1.00  " in capsys.readouterr().out and len(history.load(file)) == 2
    assert main([*given, "--against", str(file), "--temperature", "0.5", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["rows"] and "None of 2 earlier runs is comparable" in err and len(history.load(file)) == 2
    (tmp_path / "other.txt").write_text("a letter\n")
    for more, message in (
        (("--profile", "--history", str(file)), "not of --shapes, --profile or --serve"),
        (("--shapes", "B-256", "--against", str(file)), "not of --shapes, --profile or --serve"),
        (("--against", str(tmp_path / "none.jsonl")), "There is no"),
        (("--history", str(tmp_path / "other.txt")), "Line 1 of"),
    ):
        assert main([*given, *more]) == 2
        assert message in capsys.readouterr().err
