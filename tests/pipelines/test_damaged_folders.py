"""Saved pipelines that are damaged, and names that lead nowhere: one sentence each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from visar.errors import VisarError
from visar.pipelines import TextToImagePipeline

WEIGHTS = "gpt/diffusion_pytorch_model.safetensors"


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def edit(folder: Path, file: str = WEIGHTS, **tensors: torch.Tensor | None) -> None:
    """Replace tensors of a weights file; None takes one out."""
    state = load_file(folder / file) | tensors
    save_file({k: t for k, t in state.items() if t is not None}, folder / file)


def index(folder: Path, **entries: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | entries).items() if v is not None}))


NAN = {"norm.weight": torch.full((32,), torch.nan)}
DAMAGE = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "is not a saved pipeline: it has no readable model_"),
    "index cut": (lambda f: (f / "model_index.json").write_text("{"), "model_index.json: it is not valid JSON"),
    "index a list": (lambda f: (f / "model_index.json").write_text("[]"), "model_index.json: it should be an object"),
    "another model": (
        lambda f: index(f, _class_name="Other", gpt=None),
        "holds 'Other', which no family of visar loads",
    ),
    "unknown encoder": (
        lambda f: index(f, text_encoder=["x", "Clip"]),
        "text_encoder holds a Clip; text encoders are WordEncoder and T5",
    ),
    "no encoder": (
        lambda f: index(f, text_encoder=None),
        "takes captions: it needs a text_encoder",
    ),
    "unknown setting": (
        lambda f: index(f, colour=3),
        "has a setting 'colour'; known are grid, guidance_scale, top_k",
    ),
    "weights cut": (cut, "Cannot read .*gpt.*truncated"),
    "weights gone": (lambda f: (f / WEIGHTS).unlink(), "There is no diffusion_pytorch_model.safetensors in .*gpt"),
    "encoder gone": (lambda f: shutil.rmtree(f / "text_encoder"), "There is no .*text_encoder/config.json"),
    "tensor gone": (lambda f: edit(f, **{"norm.weight": None}), r"Tensor 'norm\.weight' is missing from .*gpt"),
    "tensor more": (lambda f: edit(f, more=torch.ones(1)), "gpt.* has a tensor 'more' that this model does not"),
    "tensor shape": (lambda f: edit(f, **{"norm.weight": torch.ones(31)}), r"gpt.* has shape \[31\], expected \[32\]"),
    "NaN": (lambda f: edit(f, **NAN), r"Tensor 'norm\.weight' of .*gpt.* holds a NaN"),
    "infinity": (
        lambda f: edit(f, "text_encoder/model.safetensors", scale=torch.full((10,), torch.inf)),
        "Tensor 'scale' of .*text_encoder.* holds a NaN",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders(text_folder: Path, tmp_path: Path, damage: str) -> None:
    spoil, message = DAMAGE[damage]
    shutil.copytree(text_folder, tmp_path / "pipe")
    spoil(tmp_path / "pipe")
    with pytest.raises(VisarError, match=message) as caught:
        TextToImagePipeline.from_pretrained(tmp_path / "pipe")
    assert "\n" not in str(caught.value)


def test_names_that_lead_nowhere(class_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError

    for function in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(f"huggingface_hub.{function}", offline)
    for name, message in {
        "icon": "Unknown model 'icon'. Did you mean 'icons'",
        tmp_path / "none": "There is no model folder",
        class_folder: "class is called with a class, not a prompt; give --class or --classes",
        "owner/name": "Could not download 'owner/name' from the hub: ConnectionError",
        "a" * 300: "The model a+ cannot be read: File name too long",
        "a" * 300 + ".pt": r"The model a+\.pt cannot be read: File name too long",
    }.items():
        with pytest.raises(VisarError, match=message):
            TextToImagePipeline.from_pretrained(name)
