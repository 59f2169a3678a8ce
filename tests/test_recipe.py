"""What a PNG file says of its making, and the command for it."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from visar.cli import main, parser
from visar.recipe import Recipe
from visar.samplers import SpeculativeJacobi
from visar.samplers.parameters import option


def recipe_of(**values: Any) -> Recipe:
    common: dict[str, Any] = {"model": "glm", "prompt": "a cat", "sampler": "scd", "exactness": "exact"}
    return Recipe(**common | values)


def understood(recipe: Recipe) -> Any:
    """The options that the command gives to visar when it is pasted into a shell."""
    command = recipe.command()
    assert command.isprintable()  # nothing that a terminal obeys
    said = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True).stdout
    return parser().parse_args(said.decode().split("\0")[1:-1])


def test_a_height_and_a_width(tmp_path: Path) -> None:
    recipe = recipe_of(load=[("image-size", "96x64")])
    Image.new("RGB", (96, 64)).save(tmp_path / "a.png", pnginfo=recipe.info())
    found = Recipe.read(tmp_path / "a.png")
    assert found == recipe and "--image-size 96x64" in found.command() and "image_size='96x64'" in found.python()


@pytest.mark.parametrize(
    "prompt",
    ["a red\xa0heart", "\U0001f469\u200d\U0001f373 it's!", "two\nlines\tand \\x1b", "\x1b[31m\x9b1m", "\u202ered",
     "$(a) `b`", "-heart", "--", "-1\xa0", "ж\u200b7"],
)  # fmt: skip
def test_the_command_means_the_same_prompt(prompt: str) -> None:
    assert understood(recipe_of(prompt=prompt)).prompt == [prompt]


def test_values_that_begin_as_options_do() -> None:
    settings: dict[str, Any] = {"guidance_scale": -1e-5, "seed": 3}
    given = understood(recipe_of(model="-m", sampler="-s.py:S", load=[("vq", "-v.pt")], settings=settings))
    assert (given.model, given.sampler, given.vq) == ("-m", "-s.py:S", "-v.pt")
    assert (given.guidance_scale, given.seed) == (-1e-5, 3)


@dataclass(frozen=True)
class Own(SpeculativeJacobi):
    """A sampler of a user, with fields that no command can give."""

    levels: tuple[int, ...] = (1, 2)
    bias: Any = option(None, "a bias")
    name: ClassVar[str] = "own"  # type: ignore[misc]


def test_a_sampler_of_the_users() -> None:
    common: dict[str, Any] = {"model": "icons", "prompt": "a cat"}
    recipe = Recipe.of(Own(window=8), place="us.py:Own", **common)
    assert recipe.sampler == "us.py:Own" and recipe.parameters["window"] == 8
    assert {"levels", "bias"}.isdisjoint(recipe.parameters)
    given = understood(recipe)
    assert given.sampler == "us.py:Own" and "window=8" in given.parameters


def test_files_of_before_there_were_grids() -> None:
    old = '{"model": "icons", "prompt": "class room", "sampler": "scd", "exactness": "exact", "settings": {"seed": 0}}'
    recipe = Recipe.model_validate_json(old)
    assert (recipe.title, recipe.count, recipe.grid, recipe.scale) == ("class room", 1, False, 1)
    assert recipe.command() == "visar generate 'class room' --model icons --sampler scd --seed 0 --dtype float32"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"decoded": 4}, "4 in this file and 1 in the command"), ({}, "an unknown number in this file and 1 in the"),
        ({"decoded": 4, "image": 1}, "4 in this file and 2 in the command"), ({"decoded": 4, "image": 3}, ""),
        ({"decoded": 4, "dtype": "float32"}, ""), ({"decoded": 4, "settings": {"invariant": True}}, ""),
        ({"decoded": 4, "image": 1, "grid": True, "others": ["a sun"]}, ""),
    ],
)  # fmt: skip
def test_what_rounds_by_the_batch(values: dict[str, Any], said: str) -> None:
    note = recipe_of(**{"dtype": "bfloat16"} | values).note()
    assert said in note and bool(note) == bool(said)


def test_ordinary_commands_are_plain() -> None:
    command = "visar generate 'a cat' --model glm --sampler scd --set window=4 --seed 0 --dtype float32 -n 2"
    assert recipe_of(parameters={"window": 4}, settings={"seed": 0}, image=1).command() == command


@pytest.mark.parametrize("given", [["--grid", "-n", "2"], ["-n", "2", "--scale", "2"]])
def test_the_program_writes_the_same_file(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    command = ["generate", "a sun", "--dtype", "float32", "--set", "window=8", "-o", str(tmp_path / "a.png"), *given]
    assert main(command) == 0
    file = max(tmp_path.glob("*.png"))
    recipe = Recipe.read(file)
    exec(recipe.python(), {})
    (made,) = (tmp_path / "again").iterdir()
    assert made.name == recipe.file_name
    with Image.open(file) as old, Image.open(made) as new:
        assert old.size == new.size and old.tobytes() == new.tobytes()


def test_a_program_that_loads_a_drafter_and_rounds_weights() -> None:
    recipe = recipe_of(load=[("drafter", "d"), ("quantize", "int8"), ("vq", "v.pt")], grid=True, others=["a sun"])
    said = recipe.python()
    assert "visar.load('glm', vq='v.pt')\n" in said and "pipe.load_drafter('d')\npipe.quantize('int8')\n" in said
    assert "pipe(['a cat', 'a sun'], " in said and "grid(out.images).save(" in said
