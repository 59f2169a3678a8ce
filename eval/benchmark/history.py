"""A history of benchmark runs: one JSON line per run, and the ratios of a run to an earlier one of the same settings.

Times compare only on the same machine: runs match when their device, dtype, threads, batch, images and settings do.
The bandwidth of a copy is measured in each run, so a ratio of bandwidths far from 1 says that the machine was busy.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

from typing_extensions import TypedDict

import visar
from visar.eval.benchmark.speed import SpeedReport
from visar.files import append_line
from visar.reading import read_lines
from visar.tables import table

_SAME = ("device", "dtype", "threads", "batch", "images")  # of the report, besides the settings


@dataclass(frozen=True)
class BenchmarkRun:
    """One line of a history. `date` is UTC in ISO 8601; `commit` is None outside a checkout of visar.

    `settings` are those that a comparable run must share; `report` is the `SpeedReport` as a dictionary.
    """

    date: str
    version: str
    commit: str | None
    settings: dict[str, Any]
    report: dict[str, Any]


class Row(TypedDict):
    """What is compared of a sampler."""

    __pydantic_config__ = {"extra": "allow"}  # type: ignore[misc]  # noqa: RUF012 (pydantic reads it)

    sampler: str
    nfe: float
    ms_per_pass: float
    seconds_per_image: float


class Measured(TypedDict):
    """What is read of a report, which has more."""

    __pydantic_config__ = {"extra": "allow"}  # type: ignore[misc]  # noqa: RUF012

    device: str
    dtype: str
    threads: int
    batch: int
    images: int
    bandwidth: float
    torch: str
    rows: list[Row]


class Stored(TypedDict):
    """A line of a history."""

    date: str
    version: str
    commit: str | None
    settings: dict[str, Any]
    report: Measured


def run_of(report: SpeedReport, settings: Mapping[str, Any]) -> BenchmarkRun:
    """The run that was just measured. Settings that are None, False or empty are left out."""
    given = {k: v for k, v in settings.items() if v is not None and v is not False and v != []}
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    plain: dict[str, Any] = json.loads(json.dumps({"settings": given, "report": asdict(report)}, default=str))
    return BenchmarkRun(date, visar.__version__, _commit(), **plain)


def append(path: str | Path, run: BenchmarkRun) -> None:
    """Add a line to the file, which is made if need be."""
    append_line(path, json.dumps(asdict(run), sort_keys=True))


def load(path: str | Path) -> list[BenchmarkRun]:
    """All runs of a file that `append` wrote, oldest first."""
    return [BenchmarkRun(**cast(Any, run)) for _, run in read_lines(path, Stored)]


def comparable(a: BenchmarkRun, b: BenchmarkRun) -> bool:
    """Whether device, dtype, threads, batch, images and settings are the same."""
    return a.settings == b.settings and all(a.report[name] == b.report[name] for name in _SAME)


def comparison(run: BenchmarkRun, history: list[BenchmarkRun]) -> str:
    """Ratios of `run` to the last comparable run, sampler by sampler; or a sentence that there is none."""
    before = next((old for old in reversed(history) if comparable(run, old)), None)
    if before is None:
        r = run.report
        return (
            f"None of {len(history)} earlier runs is comparable: none has the same settings on {r['device']}, "
            f"{r['dtype']}, {r['threads']} threads, batch {r['batch']}, {r['images']} images."
        )
    old, new = _rows(before.report), _rows(run.report)
    rows = [
        (name, *(_ratio(new[name][key], old[name][key]) for key in ("nfe", "ms_per_pass", "seconds_per_image")))
        for name in new
        if name in old
    ]
    commit = f", commit {before.commit[:12]}" if before.commit else ""
    lines = [f"Ratios to the run of {before.date} (visar {before.version}{commit}); below 1 is faster:"]
    lines.append(table(("SAMPLER", "NFE", "MS/PASS", "S/IMAGE"), rows) if rows else "It has none of these samplers.")
    if missing := [name for name in new if name not in old]:
        lines.append(f"That run did not measure {', '.join(missing)}.")
    if before.report["torch"] != run.report["torch"]:
        lines.append(f"PyTorch was {before.report['torch']} and is {run.report['torch']}.")
    bandwidth = _ratio(run.report["bandwidth"], before.report["bandwidth"])
    lines.append(f"Bandwidth of a copy: {bandwidth} of what it was; far from 1, the machine was busy in one of them.")
    return "\n".join(lines)


def _rows(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows by sampler. Its label has the parameters that were written out, its window is in the row."""
    return {row["sampler"]: row for row in report["rows"]}


def _ratio(new: float, old: float) -> str:
    return f"{new / old:.2f}" if old else "-"


def _commit() -> str | None:
    """The commit of the checkout that visar is imported from, "-dirty" where files differ from it."""
    package = Path(visar.__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent:
            return None  # the repository of something else, with an environment in it
        return git("describe", "--always", "--dirty", "--exclude=*", "--abbrev=40")
    except (OSError, subprocess.CalledProcessError):
        return None
