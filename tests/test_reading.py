"""The reader of JSON: what it takes, and one sentence for everything else, before anything is allocated."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from visar.errors import VisarError
from visar.reading import Count, Positive, Side, Size, checked_arguments, parse_json, read_json, read_lines


@dataclass
class Shape:
    layers: Count
    names: tuple[str, ...] = ()
    scale: Positive = 1.0


def test_what_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for text in ('{"layers": 3, "names": ["a"], "more": 1}', '\ufeff{"layers": 3, "names": ["a"]}'):
        file.write_text(text, encoding="utf-8")
        assert read_json(file, Shape) == Shape(3, ("a",))
    file.write_text('{"layers": 3, "names": ["a"]}', encoding="utf-16")
    assert read_json(file, Shape) == Shape(3, ("a",))
    file.write_text('{"layers": 1}\n\n{"layers": 2, "scale": 2}\n')
    assert [(n, s.layers, s.scale) for n, s in read_lines(file, Shape)] == [(1, 1, 1.0), (3, 2, 2.0)]


WRONG: dict[str, tuple[str | bytes, str]] = {
    "nothing": ("", "not valid JSON"),
    "cut": ('{"layers": ', "not valid JSON"),
    "a list": ("[1]", r"it should be an object, not \[1\]"),
    "null": ("null", "it should be an object, not null"),
    "text for a number": ('{"layers": "3"}', "layers should be a valid integer, not '3'"),
    "a fraction": ('{"layers": 1.5}', "layers should be a valid integer, not 1.5"),
    "a float for an int": ('{"layers": 3.0}', "layers should be a valid integer, not 3.0"),
    "a bool for an int": ('{"layers": true}', "layers should be a valid integer, not true"),
    "a billion": ('{"layers": 1000000000}', "layers should be less than or equal to 4096, not 1000000000"),
    "negative": ('{"layers": -1}', "layers should be greater than or equal to 0, not -1"),
    "a huge number": ('{"layers": ' + "9" * 4000 + "}", "less than or equal to 4096, not a number of 132.* bits"),
    "too many digits": ('{"layers": ' + "9" * 9000 + "}", "not valid JSON"),
    "a missing key": ("{}", "it has no 'layers'"),
    "a key twice": ('{"layers": 1, "layers": 2}', "it has 'layers' twice"),
    "NaN": ('{"layers": 1, "scale": NaN}', "'NaN' is no finite number"),
    "infinity": ('{"layers": 1, "scale": 1e999}', "'1e999' is no finite number"),
    "zero": ('{"layers": 1, "scale": 0}', "scale should be greater than 0, not 0"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "deep and closed": ('{"layers": 1, "x": ' + "[" * 500 + "]" * 500 + "}", "nested too deeply"),
    "another encoding": ('{"layers": 1, "names": ["é"]}'.encode("latin-1"), "it is no UTF-8 text"),
    "a lone surrogate": ('{"layers": 1, "names": ["\\ud800"]}', "a lone surrogate, which is no valid text"),
    "a long value": ('{"layers": "' + "x" * 10**5 + '"}', r"not 'xxx+\.\.\.\.$"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_refused(kind: str, tmp_path: Path) -> None:
    text, message = WRONG[kind]
    file = tmp_path / "a.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(VisarError, match=rf"a\.json: .*{message}") as caught:
        read_json(file, Shape)
    said = str(caught.value)
    assert "\n" not in said and len(said) < 400 and said.count("Cannot read") == 1


def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long").write_text("[1]")
    for name, message in ((".", "it is a folder"), ("none", "There is no file"), ("pipe", "it is not a regular file")):
        with pytest.raises(VisarError, match=message):
            read_json(tmp_path / name, Shape)
    monkeypatch.setattr("visar.texts.LARGEST", 2)
    with pytest.raises(VisarError, match="it has more than 0 MiB"):
        read_json(tmp_path / "long", Shape)


def test_a_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"layers": 1}\n{"layers": "x"}\n')
    with pytest.raises(VisarError, match=r"^Line 2 of .*a\.jsonl: layers should be a valid integer, not 'x'\.$"):
        list(read_lines(tmp_path / "a.jsonl", Shape))


def test_arguments() -> None:
    def make(self: Any, dim: Size = 8, grid: Side | None = None, ours: set[Unknown] = (), odd: Odd = 0) -> None:  # type: ignore  # noqa: F821
        """Annotations that only type checkers see are not checked."""

    class Made:
        def __init__(self, dim: Size = 8, grid: Side | None = None, other: object = None):
            pass

    assert checked_arguments(make, {"odd": 3}, "x") == {"odd": 3}
    given = {"dim": 3, "grid": None, "other": {"a": 1}}
    assert checked_arguments(Made.__init__, given, "x") == given
    for values, message in (
        ({"dim": 0}, "x: dim should be greater than or equal to 1, not 0"),
        ({"grid": 10**9}, "x: grid should be less than or equal to 1024"),
        ({"dims": 3}, "x: Unknown setting 'dims'. Did you mean 'dim'"),
    ):
        with pytest.raises(VisarError, match=message):
            checked_arguments(Made.__init__, values, "x")


def test_pydantic_is_imported_when_a_file_is_read() -> None:
    code = "import sys, visar, visar.cli, visar.families.source; print('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    assert parse_json("3", int, "x") == 3
