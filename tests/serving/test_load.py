"""`visar bench --serve`, small: its table, and what it says of idle rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from visar.cli import main
from visar.serving import load


def test_all_systems_under_all_loads(text_pipe: Any) -> None:
    report = load.measure_load(text_pipe, "scd", rows=2, images=2, minutes=0.001, clients=(1, 3), loads=(0.9,))
    systems = ("serve", "static batches", "one at a time")
    assert [(row.load, row.system) for row in report.table] == [
        (what, system) for what in ("1 client", "3 clients", "Poisson 0.9") for system in systems
    ]
    for row in report.table:
        assert (
            row.images == (3 if row.load == "3 clients" else 2) and row.images_per_second > 0 and 0 < row.p50 <= row.p99
        )
        assert (row.first_partial is not None) == (row.system == "serve")
        assert row.first_partial is None or row.first_partial <= row.p99
        assert 0 <= row.idle < 1
    one = [row.idle for row in report.table if row.load == "1 client"]
    assert one == [0, 0, 0]  # on a CPU one client gets a pool of one row, of the two that there may be
    assert report.capacity == report.table[3].images_per_second
    assert report.soak is not None and report.soak.images >= 2 and report.soak.after > 100


def test_an_error_is_not_counted_as_an_image(text_pipe: Any) -> None:
    with pytest.raises(RuntimeError, match=r"no image \(status 400\)"):
        load.measure_load(text_pipe, "scd", images=1, clients=(1,), loads=(), top_p=0)


@pytest.mark.slow
def test_the_command(text_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(load, "CLIENTS", (1,))
    words = ["bench", "--model", str(text_folder), "--dtype", "float32", "--serve", "-n", "2", "--batch", "2"]
    assert main([*words, "--minutes", "0.001", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["sampler"], told["rows"], len(told["table"])) == ("scd", 2, 9) and told["soak"]["images"] >= 2
    assert main([*words, "--samplers", "ar,scd"]) == 2 and "one sampler" in capsys.readouterr().err
    assert main(["bench", "--minutes", "1"]) == 2 and "--serve" in capsys.readouterr().err
