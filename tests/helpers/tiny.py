"""Tiny random models and image sets: everything the real ones have, in a thousandth of the size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from visar.eval.quality.extractors import Extractor
from visar.families.llamagen.gpt import LlamaGen

WORDS = ("red", "blue", "heart", "star", "cat", "dog", "city", "3d", "noto", "flat")
GRID = 5
GPT: dict[str, Any] = dict(vocab_size=24, dim=32, num_layers=2, num_heads=2, ffn=48, grid=GRID)
VQ: dict[str, Any] = dict(
    codebook_size=24, code_dim=4, channels=32, channel_multipliers=(1, 2), res_blocks=1, z_channels=16
)


def text_gpt(length: int = 4, features: int = 6) -> LlamaGen:
    return LlamaGen(**GPT, condition="text", condition_length=length, caption_features=features).eval()


def class_gpt() -> LlamaGen:
    return LlamaGen(**GPT, condition="class", classes=7).eval()


class Cells(Extractor):
    """Features that need no network: pixels in 3x3 cells."""

    def __init__(self) -> None:
        self.name, self.weights, self.resize, self.versions = "cells", "none", "none", {}

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        return {"pool": torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 3).flatten(1)}


def image_folder(
    folder: Path,
    concepts: int,
    styles: tuple[str, ...] = ("",),
    size: int = 8,
    groups: tuple[str, ...] = ("even", "odd"),
) -> Path:
    """A `pictures.json` folder: every concept in every style, captioned with words of the tiny encoder."""
    folder.mkdir(parents=True)
    entries = []
    for i in range(concepts):
        for style in styles:
            name = f"{i}{style}.png"
            Image.new("RGB", (size, size), (i * 37 % 256, i * 91 % 256, len(style) * 40)).save(folder / name)
            entry = {"file": name, "caption": f"{WORDS[i % 7]} {i}", "concept": f"thing {i}", "tags": ["a", "b"]}
            entries.append(entry | {"style": style, "group": groups[i % len(groups)]})
    (folder / "pictures.json").write_text(json.dumps(entries))
    return folder
