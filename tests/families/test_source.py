"""Folders of models: what their JSON files may say, and that their parts stay where they belong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from visar.errors import VisarError
from visar.generation.model import ImageModel


@pytest.fixture
def folder(text_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(text_folder, tmp_path / "model"))


def note(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def moved(folder: Path) -> None:
    shutil.move(folder / "gpt", folder.parent / "elsewhere")
    (folder / "gpt").symlink_to(folder.parent / "elsewhere")


INDEX, GPT, VQ, WORDS = "model_index.json", "gpt/config.json", "vq/config.json", "text_encoder/config.json"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a part above": (lambda f: note(f / INDEX, _parts_of={"vq": "../other"}), "'../other', which is no embedded model"),
    "a part anywhere": (lambda f: note(f / INDEX, _parts_of={"vq": "/etc"}), "'/etc', which is no embedded model"),
    "a list of parts": (lambda f: note(f / INDEX, _parts_of=["vq"]), "_parts_of should be an object"),
    "a link out of the folder": (moved, "gpt is a link out of the model's folder"),
    "a class of a component": (lambda f: note(f / INDEX, text_encoder="x"), "model_index.json does not say its class"),
    "an unknown setting": (lambda f: note(f / INDEX, colour=1), "has a setting 'colour'"),
    "a grid of text": (lambda f: note(f / INDEX, grid="5"), "model_index.json: grid should be a valid integer"),
    "a grid of a billion": (lambda f: note(f / INDEX, grid=10**9), "grid should be less than or equal to 1024"),
    "a scale of text": (lambda f: note(f / INDEX, guidance_scale="7"), "guidance_scale should be a valid number"),
    "layers": (lambda f: note(f / GPT, num_layers=10**9), "num_layers should be less than or equal to 4096"),
    "fewer layers than that": (lambda f: note(f / GPT, num_layers=4000), "num_layers is 4000, and .* has 20 tensors"),
    "no heads": (lambda f: note(f / GPT, num_heads=0), "num_heads should be greater than or equal to 1"),
    "odd heads": (lambda f: note(f / GPT, num_heads=3), "A width of 32 cannot be split into 3 heads"),
    "a bool": (lambda f: note(f / GPT, dim=True), "dim should be a valid integer, not true"),
    "a condition": (lambda f: note(f / GPT, condition="image"), "condition should be 'class' or 'text', not 'image'"),
    "a vocabulary": (lambda f: note(f / GPT, vocab_size=2**24), r"shape \[24, 32\], expected \[16777216, 32\]"),
    "channels": (lambda f: note(f / VQ, channel_multipliers=[1] * 99), "channel_multipliers should have at most 16"),
    "a background": (lambda f: note(f / VQ, background=24), "The background is code 24, and the codes are 0 to 23"),
    "slots": (lambda f: note(f / WORDS, length=10**9), "length should be less than or equal to 4096"),
    "other slots": (lambda f: note(f / WORDS, length=8), "captions of 8 slots of 6 features, and the GPT takes 4 of 6"),
    "a class twice": (
        lambda f: (f / GPT).write_text('{"_class_name": "A", "_class_name": "B"}'),
        "'_class_name' twice",
    ),
    "no text": (lambda f: (f / INDEX).write_bytes(b"\xff\xfe\xff"), "it is no UTF-8 text"),
    "deep": (lambda f: (f / INDEX).write_text("[" * 100_000), "it is nested too deeply"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders(damage: str, folder: Path) -> None:
    spoil, message = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(VisarError, match=message) as caught:
        ImageModel.load(folder)
    assert "\n" not in str(caught.value)


def test_shards_of_a_component(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    whole = folder / "gpt" / "diffusion_pytorch_model.safetensors"
    state = load_file(whole)
    whole.unlink()
    names = {key: f"{whole.stem}-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(state)}
    for name in set(names.values()):
        save_file({key: state[key] for key in state if names[key] == name}, folder / "gpt" / name)
    (folder / "gpt" / f"{whole.name}.index.json").write_text(json.dumps({"weight_map": names}))
    assert ImageModel.load(folder).family.model.state_dict().keys() == state.keys()
