"""Plots: the same figures give the same file, and what cannot be drawn or written is said."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from visar.errors import VisarError
from visar.eval.report.plots import Point, draw

POINTS = [Point("ar", "ar", 1, 0.1, exact=True), Point("gsd", "gsd a", 0.4, 0.3, 0.1), Point("gsd", "gsd b", 0.5, 0.2)]


def test_the_same_figures_give_the_same_file(tmp_path: Path) -> None:
    for name in "ab":
        draw(POINTS, tmp_path / f"{name}.svg", x="passes", y="distance", floor=0)
    first = (tmp_path / "a.svg").read_text()
    assert first == (tmp_path / "b.svg").read_text() and sorted(f.name for f in tmp_path.iterdir()) == [
        "a.svg",
        "b.svg",
    ]
    assert all(f">{label}</text>" in first for label in ("gsd a", "gsd b", "passes", "distance"))
    draw(POINTS[:1], tmp_path / "a.svg", x="passes", y="distance")
    assert (tmp_path / "a.svg").read_text() != first


def test_files_that_are_no_plots(tmp_path: Path) -> None:
    for name, message in (("a.xyz", "not a .xyz file"), ("a", "not a nameless file")):
        with pytest.raises(VisarError, match=message):
            draw(POINTS, tmp_path / name, x="x", y="y")
    (tmp_path / "file").touch()
    with pytest.raises(VisarError, match="Cannot write to folder"):
        draw(POINTS, tmp_path / "file" / "a.svg", x="x", y="y")


def test_a_missing_extra_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(VisarError, match="Plots need matplotlib, of the extras"):
        draw(POINTS, tmp_path / "a.svg", x="x", y="y")
