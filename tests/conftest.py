"""Tiny random pipelines: everything the real ones have, in a thousandth of the size."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Before anything imports Triton: without a GPU its kernels are tested in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from tests.helpers.tiny import GPT, VQ, WORDS, class_gpt, text_gpt
from visar.drafters import DraftHeads, EagleHead, ExitHead, SkippedLayers
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.vq import VQModel
from visar.pipelines import ClassToImagePipeline, TextToImagePipeline
from visar.text_encoders.words import WordEncoder

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
PROCESSES = min(CORES, 4)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """A run of all tests uses all cores, where pytest-xdist is installed and nothing else was asked for."""
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if "PYTEST_XDIST_WORKER" in os.environ or config.option.markexpr == "ray":
        return  # a process of such a run has no processes of its own, and one cluster is enough
    if everything and config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None:
        config.option.numprocesses, config.option.dist = PROCESSES, "loadfile"
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch processes of several threads slow one another


@pytest.fixture(autouse=True, scope="session")
def own_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is left in the user's cache folder, and no product has a form that depends on the clock."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISAR_LINEAR", "packed")
        patch.setenv("VISAR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """A Ray cluster of this machine, one for all tests that are marked `ray`."""
    pytest.importorskip("ray", reason="the extra `cluster` is not installed")
    from visar.cluster import connected

    with connected() as ray:
        yield ray


@pytest.fixture(scope="session")
def words() -> WordEncoder:
    vectors = torch.randn(len(WORDS), 12, generator=torch.Generator().manual_seed(0))
    return WordEncoder.compress(WORDS, vectors, features=6, length=4)


@pytest.fixture(scope="session")
def text_folder(words: WordEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipelines") / "text"
    TextToImagePipeline(
        gpt=text_gpt(), vq=VQModel(**VQ).eval(), text_encoder=words, guidance_scale=2.0, top_k=0
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def class_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("pipelines") / "class"
    ClassToImagePipeline(gpt=class_gpt(), vq=VQModel(**VQ).eval(), guidance_scale=2.0, top_k=0).save_pretrained(folder)
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
        EagleHead(32, 2, 48),
        DraftHeads(32, 5),
        DraftHeads(32, 5, reads_tokens=True),
        ExitHead(32, 2, 48, layers=1),
        SkippedLayers([1]),
    ]
    for drafter in made:
        drafter.save_pretrained(folder / drafter.kind)
    small = LlamaGen(**GPT | dict(dim=16, num_layers=1), condition="text", condition_length=4, caption_features=6)
    small.save_pretrained(folder / "small")
    return [*(folder / drafter.kind for drafter in made), folder / "small"]
