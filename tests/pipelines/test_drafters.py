"""Drafters of a pipeline: found, loaded, and refused where they do not fit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.tiny import GPT, GRID
from visar.drafters import DraftHeads, EagleHead, ExitHead, SkippedLayers
from visar.errors import VisarError
from visar.families.llamagen.gpt import LlamaGen
from visar.pipelines import TextToImagePipeline
from visar.samplers import Speculative, TreeSpeculative

TOKENS = GRID**2


def test_a_model_that_drafts_for_itself_is_never_rejected(text_pipe: TextToImagePipeline, text_folder: Path) -> None:
    text_pipe.load_drafter(text_folder)
    for sampler, depth in ((Speculative(gamma=4), 4), (TreeSpeculative(tree="1x1x1", drafter="model"), 3)):
        stats = text_pipe(["cat", "red heart"], sampler=sampler, output_type="tokens").stats
        assert stats.passes_per_image == [-(-TOKENS // (depth + 1))] * 2


def test_a_drafter_beside_the_model_is_found(text_folder: Path, drafters: list[Path], tmp_path: Path) -> None:
    shutil.copytree(text_folder, tmp_path / "pipe")
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(VisarError, match="Sampler 'eagle' needs a drafter of the kind 'eagle'; give it with"):
        pipe("cat", sampler="eagle")
    with pytest.raises(VisarError, match="Sampler 'speculative' needs a smaller model"):
        pipe("cat", sampler="speculative")
    shutil.copytree(drafters[0], tmp_path / "pipe" / "eagle")
    assert pipe("cat", sampler="eagle", output_type="tokens").stats.sampler == "eagle"


def test_drafters_that_do_not_fit(text_pipe: TextToImagePipeline, class_folder: Path, tmp_path: Path) -> None:
    EagleHead(64, 2, 48).save_pretrained(tmp_path / "wide")
    EagleHead(32, 2, 48, target="0123").save_pretrained(tmp_path / "other")
    own = dict(condition="text", condition_length=4, caption_features=6)
    LlamaGen(**GPT | dict(vocab_size=23), **own).save_pretrained(tmp_path / "codes")
    LlamaGen(**GPT | dict(grid=6), **own).save_pretrained(tmp_path / "grid")
    EagleHead(32, 4, 48).save_pretrained(tmp_path / "heads")
    SkippedLayers([0, 7]).save_pretrained(tmp_path / "layers")
    ExitHead(32, 2, 48, layers=9).save_pretrained(tmp_path / "exit")
    for name in ("cut", "nan"):
        shutil.copytree(tmp_path / "other", tmp_path / name)
    file = "diffusion_pytorch_model.safetensors"
    (tmp_path / "cut" / file).write_bytes((tmp_path / "cut" / file).read_bytes()[:-100])
    state = load_file(tmp_path / "nan" / file)
    state["norm.weight"][0] = torch.nan
    save_file(state, tmp_path / "nan" / file)
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "wide", "is 64 wide, the target 32"), (tmp_path / "other", "was trained for another target"),
        (tmp_path / "heads", "has heads of 8, the target of 16"), (tmp_path / "cut", "Cannot read .*cut.*truncated"),
        (tmp_path / "layers", r"uses layers \[0, 7\] of a target that has 2"),
        (tmp_path / "exit", "of a target that has 2"), (tmp_path / "nan", "'norm.weight' .* holds a NaN"),
        (tmp_path / "codes", "has 23 codes, the target 24"),
        (tmp_path / "grid", "generates 6 x 6 tokens, the target 5 x 5"),
        (class_folder, "has condition class, the target text"), (tmp_path / "empty", "holds no drafter"),
        (tmp_path / "none", "There is no model folder"), ("some/one", "There is no drafter folder some/one"),
        (class_folder / "vq", "holds a VQModel, not a drafter"), ("a" * 300, "The drafter a+ cannot be read"),
    ):  # fmt: skip
        with pytest.raises(VisarError, match=message):
            text_pipe.load_drafter(path)
    DraftHeads(32, 2).save_pretrained(tmp_path / "few")
    text_pipe.load_drafter(tmp_path / "few")
    with pytest.raises(VisarError, match="has 2 heads and cannot draft 3 tokens deep"):
        text_pipe("cat", sampler="medusa")
