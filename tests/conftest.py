"""Tiny random pipelines: everything the real ones have, in a thousandth of the size."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

# Before anything imports Triton: without a GPU its kernels are tested in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from visar.eval.extractors import Extractor
from visar.models.drafters import DraftHeads, EagleHead, ExitHead, SkippedLayers
from visar.models.llamagen import LlamaGen
from visar.models.vq import VQModel
from visar.models.words import WordEncoder
from visar.pipelines import ClassToImagePipeline, TextToImagePipeline

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
PROCESSES = min(CORES, 4)
WORDS = ("red", "blue", "heart", "star", "cat", "dog", "city", "3d", "noto", "flat")
GRID = 5
GPT: dict[str, Any] = dict(vocab_size=24, dim=32, num_layers=2, num_heads=2, ffn=48, grid=GRID)
VQ: dict[str, Any] = dict(
    codebook_size=24, code_dim=4, channels=32, channel_multipliers=(1, 2), res_blocks=1, z_channels=16
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """A run of all tests uses all cores, where pytest-xdist is installed and nothing else was asked for."""
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # a process of such a run has no processes of its own
    if everything and config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None:
        config.option.numprocesses, config.option.dist = PROCESSES, "loadfile"
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch processes of several threads slow one another


def text_gpt(length: int = 4, features: int = 6) -> LlamaGen:
    return LlamaGen(**GPT, condition="text", condition_length=length, caption_features=features).eval()


def class_gpt() -> LlamaGen:
    return LlamaGen(**GPT, condition="class", classes=7).eval()


class Cells(Extractor):
    """Features that need no network: pixels in 3x3 cells."""

    def __init__(self) -> None:
        self.name, self.weights, self.resize, self.versions = "cells", "none", "none", {}

    def extract(self, pictures: Tensor) -> dict[str, Tensor]:
        return {"pool": torch.nn.functional.adaptive_avg_pool2d(pictures.float() / 255, 3).flatten(1)}


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is left in the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISAR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def words() -> WordEncoder:
    vectors = torch.randn(len(WORDS), 12, generator=torch.Generator().manual_seed(0))
    return WordEncoder.compress(WORDS, vectors, features=6, length=4)


@pytest.fixture(scope="session")
def text_folder(words: WordEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipelines") / "text"
    TextToImagePipeline(text_gpt(), VQModel(**VQ).eval(), words, guidance_scale=2.0, top_k=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def class_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("pipelines") / "class"
    ClassToImagePipeline(class_gpt(), VQModel(**VQ).eval(), guidance_scale=2.0, top_k=0).save_pretrained(folder)
    return folder


@pytest.fixture
def text_pipe(text_folder: Path) -> TextToImagePipeline:
    pipe = TextToImagePipeline.from_pretrained(text_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def class_pipe(class_folder: Path) -> ClassToImagePipeline:
    pipe = ClassToImagePipeline.from_pretrained(class_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def drafters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of a drafter of every kind, of random weights."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("drafters")
    made = [
        EagleHead(32, 2, 48), DraftHeads(32, 5), DraftHeads(32, 5, reads_tokens=True), ExitHead(32, 2, 48, layers=1),
        SkippedLayers([1]),
    ]  # fmt: skip
    for drafter in made:
        drafter.save_pretrained(folder / drafter.kind)
    small = LlamaGen(**GPT | dict(dim=16, num_layers=1), condition="text", condition_length=4, caption_features=6)
    small.save_pretrained(folder / "small")
    return [*(folder / drafter.kind for drafter in made), folder / "small"]


def picture_folder(folder: Path, concepts: int, styles: tuple[str, ...] = ("",), size: int = 8) -> Path:
    """A `pictures.json` folder: every concept in every style, captioned with words of the tiny encoder."""
    folder.mkdir(parents=True)
    entries = []
    for i in range(concepts):
        for style in styles:
            name = f"{i}{style}.png"
            Image.new("RGB", (size, size), (i * 37 % 256, i * 91 % 256, len(style) * 40)).save(folder / name)
            entry = {"file": name, "caption": f"{WORDS[i % 7]} {i}", "concept": f"thing {i}", "tags": ["a", "b"]}
            entries.append(entry | {"style": style, "group": "even" if i % 2 == 0 else "odd"})
    (folder / "pictures.json").write_text(json.dumps(entries))
    return folder
