"""The fastest form: chosen by time, kept in a file of this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from visar.kernels import choice

NAMES = ("slow", "fast")


class Clock:
    """`time.perf_counter` of forms that say how long they take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now, self.calls = 0.0, 0
        monkeypatch.setattr(choice.time, "perf_counter", lambda: self.now)

    def forms(self, **ms: float) -> dict[str, Callable[[int], None]]:
        def taking(seconds: float) -> Callable[[int], None]:
            def run(_: int) -> None:
                self.calls += 1
                self.now += seconds

            return run

        return {name: taking(t / 1e3) for name, t in ms.items()}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    monkeypatch.setenv("VISAR_CACHE", str(tmp_path / "new"))
    choice._known.cache_clear()
    return Clock(monkeypatch)


def test_the_library_wins_unless_another_form_is_clearly_faster(clock: Clock) -> None:
    assert choice._measured(clock.forms(slow=1.0, fast=0.97)) == "slow"
    assert choice._measured(clock.forms(slow=1.0, fast=0.9)) == "fast"
    clock.calls = 0
    choice._measured(clock.forms(slow=100.0, fast=90.0))
    assert clock.calls == 2 * (1 + choice.LEAST_TURNS), "a slow form is timed a few times only"


def test_a_choice_is_kept_and_a_damaged_file_is_measured_again(clock: Clock, tmp_path: Path) -> None:
    forms = clock.forms(slow=1.0, fast=0.5)
    assert choice.fastest("a", NAMES, lambda: forms) == "fast"
    calls = clock.calls
    assert choice.fastest("a", NAMES, lambda: forms) == "fast" and clock.calls == calls
    choice._known.cache_clear()  # another process
    slower = clock.forms(slow=1.0, fast=2.0)
    assert choice.fastest("a", NAMES, lambda: slower) == "fast"
    assert choice.fastest("b", NAMES, lambda: slower) == "slow"
    (file,) = (tmp_path / "new").glob("products-*.json")
    assert json.loads(file.read_text())["forms"] == {"a": "fast", "b": "slow"}
    for text in ("", "{", "[]", "null", '{"forms": 3}', '{"forms": {"a": "unknown"}}', '{"forms": {"a": [1]}}', "\0"):
        file.write_text(text)
        choice._known.cache_clear()
        assert choice.fastest("a", NAMES, lambda: slower) == "slow", text
        assert json.loads(file.read_text())["forms"]["a"] in NAMES


def test_another_processs_choices_stay_in_the_file(clock: Clock, tmp_path: Path) -> None:
    forms = clock.forms(slow=1.0, fast=0.5)
    choice.fastest("a", NAMES, lambda: forms)
    (file,) = (tmp_path / "new").glob("products-*.json")
    entry = json.loads(file.read_text())
    file.write_text(json.dumps(entry | {"forms": {"a": "slow", "c": "slow"}}))
    choice.fastest("b", NAMES, lambda: forms)
    assert json.loads(file.read_text())["forms"] == {"a": "slow", "b": "fast", "c": "slow"}


def test_without_a_folder_it_is_measured_in_each_process(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISAR_CACHE", __file__)  # no folder
    assert choice.fastest("a", NAMES, lambda: clock.forms(slow=1.0, fast=0.5)) == "fast"


def test_threads_have_a_file_of_their_own(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    one = choice._file()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert choice._file() != one
