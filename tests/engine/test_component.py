"""Components: their configuration, the folders that they are saved in, and what is refused of a folder."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from visar.engine.component import WEIGHTS, Component
from visar.errors import VisarError


class Small(Component):
    def __init__(self, width: int = 3, names: tuple[str, ...] = ("a",), bias: bool = True):
        super().__init__()
        self.line = nn.Linear(width, 2, bias=bias)
        self.register_buffer("count", torch.tensor(7))


class Bare(Component):
    def __init__(self, layers: tuple[int, ...] = ()):
        super().__init__()


def test_the_configuration_is_what_it_was_made_with() -> None:
    config = Small(4, bias=False).config
    assert dict(config) == {"width": 4, "names": ("a",), "bias": False}
    assert config.width == config["width"] == config.get("width") == 4 and "bias" in config and config.get("x") is None
    with pytest.raises(AttributeError, match="has no 'depth'; it has: width, names, bias"):
        _ = config.depth
    with pytest.raises(AttributeError, match="does not change"):
        config.width = 5
    assert config.replace(width=5).width == 5 and config.width == 4
    with pytest.raises(TypeError, match="unexpected keyword argument 'depth'"):
        Small(depth=2)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_their_configuration(clone: Callable[[Any], Any]) -> None:
    assert clone(Small(4)).config == Small(4).config


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float8_e4m3fn])
def test_a_folder_and_back(tmp_path: Path, dtype: torch.dtype | None) -> None:
    made = Small(4, names=("b", "c"))
    made.save_pretrained(tmp_path, dtype)
    stored = load_file(tmp_path / WEIGHTS)
    assert {t.dtype for k, t in stored.items() if k != "count"} == {dtype or torch.float32}
    before = torch.get_rng_state()
    again = Small.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before), "loading uses up the random numbers of others"
    assert list(again.config.names) == ["b", "c"] and again.count == 7 and not again.training
    assert again.dtype == torch.float32 and again.device.type == "cpu" and again.line.weight.requires_grad
    expected = made.line.weight.to(dtype or torch.float32).float()
    assert torch.equal(again.line.weight, expected)
    (tmp_path / WEIGHTS).write_bytes(bytes((tmp_path / WEIGHTS).stat().st_size))
    assert torch.equal(again.line.weight, expected), "the weights are still those in the file"


@pytest.mark.parametrize(("dtype", "most"), [(torch.int8, 127), (torch.int6, 31), ("int6", 31)])
def test_a_folder_of_few_bits_and_back(tmp_path: Path, dtype: torch.dtype | str, most: int) -> None:
    made = Small(8)
    made.save_pretrained(tmp_path, dtype)
    again = Small.from_pretrained(tmp_path)
    step = made.line.weight.abs().amax(1, keepdim=True) / most
    assert ((again.line.weight - made.line.weight).abs() <= step / 2 * 1.001).all() and again.line.weight.requires_grad
    assert (again.line.weight - made.line.weight).abs().max() > step.max() / 4
    assert torch.equal(again.line.bias, made.line.bias) and again.count == 7
    with torch.no_grad():
        made.line.weight[0, 0] = torch.finfo(torch.float32).max  # which its scale times 127 may be beyond
    with pytest.raises(VisarError, match=r"'line\.weight' cannot be stored as torch\.int"):
        made.save_pretrained(tmp_path / "large", dtype)
    again.save_pretrained(tmp_path / "again", dtype)
    assert torch.allclose(Small.from_pretrained(tmp_path / "again").line.weight, again.line.weight, rtol=1e-6)


def test_other_names_and_marks_of_a_folder(tmp_path: Path) -> None:
    Small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "Small" and config.pop("_visar_version")
    (tmp_path / "config.json").write_text(json.dumps(config | {"_diffusers_version": "0.30", "_name_or_path": "x"}))
    (tmp_path / WEIGHTS).rename(tmp_path / "model.safetensors")
    assert dict(Small.from_pretrained(tmp_path).config) == {"width": 3, "names": ("a",), "bias": True}


def test_a_component_without_tensors_is_a_configuration(tmp_path: Path) -> None:
    Bare((1, 2)).save_pretrained(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["config.json"]
    assert Bare.from_pretrained(tmp_path).config.layers == (1, 2)


def tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    state = load_file(folder / WEIGHTS) | changes
    save_file({k: t for k, t in state.items() if t is not None}, folder / WEIGHTS)


def note(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "There is no .*config.json"),
    "cut config": (lambda f: (f / "config.json").write_text('{"a'), "config.json: it is not valid JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: it should be an object, not"),
    "no class": (lambda f: (f / "config.json").write_text("{}"), "holds no component: its config.json names no class"),
    "another class": (lambda f: note(f, _class_name="Bare"), "holds a Bare, not a Small"),
    "more settings": (lambda f: note(f, colour=1), "config.json: Unknown setting 'colour'. Known: bias, names, width"),
    "a word": (lambda f: note(f, width="wide"), "config.json: width should be a valid integer, not 'wide'"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"There is no {WEIGHTS} in "),
    "cut weights": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "it has 263 of 272 bytes"),
    "a tensor less": (lambda f: tensors(f, count=None), "Tensor 'count' is missing from "),
    "a tensor more": (lambda f: tensors(f, more=torch.ones(1)), "has a tensor 'more' that this model does not"),
    "another shape": (lambda f: note(f, width=5), r"'line.weight' of .* has shape \[2, 3\], expected \[2, 5\]"),
    "NaN": (lambda f: tensors(f, **{"line.bias": torch.tensor([1, torch.nan])}), "'line.bias' of .* holds a NaN"),
    "infinity in 8 bits": (
        lambda f: tensors(f, **{"line.bias": torch.tensor([1, torch.inf]).to(torch.float8_e5m2)}),
        "or an infinity",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders(tmp_path: Path, damage: str) -> None:
    spoil, message = DAMAGE[damage]
    Small().save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(VisarError, match=message) as caught:
        Small.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
