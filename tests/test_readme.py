"""The README's examples run as pasted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from visar.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.S | re.M)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(command)
    assert program == "visar"
    assert main(arguments) == 0


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 6


def test_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "heart.png").exists()


def test_the_tables_name_every_sampler_and_model() -> None:
    from visar.models.specs import MODELS
    from visar.samplers import CONTINUOUS, SAMPLERS

    for name in SAMPLERS:
        assert f"| `{name}`" in README
    for name in CONTINUOUS:
        assert f"`{name}`" in README
    for spec in MODELS.values():
        assert (f"`{spec.name}`" in README) or spec.files


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (Path(__file__).parent.parent / target).exists(), target
