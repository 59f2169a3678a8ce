"""Drafters that a command is given by --drafter."""

from __future__ import annotations

from pathlib import Path

import pytest

from visar.cli import main

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("command", "given", "message"),
    [
        ("generate cat -o cat.png", "eagle", "of the kind 'eagle', which no sampler here uses; leave it out."),
        ("generate cat -o cat.png --sampler eagle", "eagle eagle", "two drafters of the kind 'eagle'; give one"),
        (
            "sample --prompts p.txt -o run --sampler medusa",
            "medusa eagle",
            "--drafter gives one of the kind 'eagle', which",
        ),
        ("bench --samplers ar,eagle", "medusa", "which no sampler here uses"),
        ("bench --serve --samplers scd -n 1 --minutes 0.01", "medusa", "which no sampler here uses"),
        ("eval report --samplers ar,sjd -o report", "small", "kind 'model', which no sampler here uses"),
        ("verify --samplers ar", "small", "which no sampler here uses"),
    ],
)
def test_a_drafter_that_changes_nothing(
    text_folder: Path, drafters: list[Path], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch,
    command: str, given: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("cat")
    more = [x for name in given.split() for x in ("--drafter", str(drafters[0].parent / name))]
    assert main([*command.split(), "--model", str(text_folder), *more]) == 2
    assert message in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["p.txt"]
