"""What users of diffusers load and save works, or a sentence says what to use: rows of docs/diffusers.md on folders."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline

import visar
from tests.helpers.tiny import VQ, class_gpt, text_gpt
from visar.errors import VisarError
from visar.families.llamagen.vq import VQModel
from visar.pipelines import ClassToImagePipeline, TextToImagePipeline
from visar.text_encoders.t5 import T5CaptionEncoder

Pipe = Any


def tokens(pipe: Pipe, prompt: Any = "red heart", **settings: Any) -> torch.Tensor:
    return pipe(prompt, output_type="tokens", **settings).tokens


def test_a_component_of_ones_own_is_taken(text_folder: Path) -> None:
    torch.manual_seed(9)
    mine = text_gpt()
    pipe = TextToImagePipeline.from_pretrained(text_folder, gpt=mine)
    assert pipe.gpt is mine and pipe.image_model.family.model is mine
    with pytest.raises(VisarError, match="Unknown keyword 'unet'"):
        TextToImagePipeline.from_pretrained(text_folder, unet=mine)
    for bad, said in ((None, "None"), ("x", "a str"), (mine.state_dict(), "a OrderedDict"), (pipe.vq, "a VQModel")):
        with pytest.raises(VisarError, match=f"gpt must be a LlamaGen, not {said}"):
            TextToImagePipeline.from_pretrained(text_folder, gpt=bad)
        with pytest.raises(VisarError, match=f"gpt must be a LlamaGen, not {said}"):
            pipe.gpt = bad
    assert pipe.gpt is mine and pipe.image_model.family.model is mine


def test_a_component_that_is_replaced_is_the_one_that_decodes(text_pipe: Pipe) -> None:
    before = tokens(text_pipe)
    torch.manual_seed(9)
    text_pipe.gpt = text_gpt()
    assert not torch.equal(tokens(text_pipe), before)


def test_loading_options(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("dtype", "torch_dtype"):
        assert TextToImagePipeline.from_pretrained(text_folder, **{key: torch.bfloat16}).dtype == torch.bfloat16
    assert TextToImagePipeline.from_pretrained(text_folder, device_map="cpu", dtype="float32").device.type == "cpu"
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(text_folder.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    TextToImagePipeline.from_pretrained(
        "me/mine", revision="abc", cache_dir="/c", token="t", local_files_only=True, subfolder=text_folder.name
    )
    assert {k: asked[k] for k in ("name", "revision", "cache_dir", "token", "local_files_only")} == {
        "name": "me/mine",
        "revision": "abc",
        "cache_dir": "/c",
        "token": "t",
        "local_files_only": True,
    }
    with pytest.raises(VisarError, match="device_map must be one device, such as 'cuda', not 'auto'"):
        TextToImagePipeline.from_pretrained(text_folder, device_map="auto")
    with pytest.raises(VisarError, match=r"dtype must be a torch.dtype"):
        TextToImagePipeline.from_pretrained(text_folder, dtype="half-ish")
    for options, message in (
        ({"dtype": torch.int64}, "dtype must be a torch.dtype"),
        ({"dtype": torch.float8_e4m3fn}, r"dtype must be a .*float64\), not torch.float8_e4m3fn"),
        ({"torch_dtype": "float8_e5m2"}, r"dtype must be a .*float64\), not 'float8_e5m2'"),
        ({"dtype": [1]}, r"dtype must be a .* not \[1\]"),
        ({"dtype": torch.float32, "torch_dtype": torch.bfloat16}, "two names of one thing"),
        ({"device_map": "gpu"}, "Unknown device 'gpu'"),
        ({"device_map": "cuda:77"}, "'cuda:77' is not there"),
        ({"revision": "abc"}, "is not from the hub"),
    ):
        with pytest.raises(VisarError, match=message):
            TextToImagePipeline.from_pretrained(text_folder, **options)
    with pytest.raises(VisarError, match="'cuda:77' is not there"):
        TextToImagePipeline.from_pretrained(pretrained_model_name_or_path=text_folder).to("cuda:77")
    for dtype in (torch.float8_e4m3fn, torch.int8):
        with pytest.raises(VisarError, match=f"dtype must be a .* not {dtype}"):
            TextToImagePipeline.from_pretrained(text_folder).to(dtype)
    for name, message in ((None, "must be a name or a path, not a NoneType"), ("", "The name of the model is empty")):
        with pytest.raises(VisarError, match=message):
            visar.load(name)
    with pytest.raises(VisarError, match="variant 'fp16'"):
        TextToImagePipeline.from_pretrained(text_folder, variant="fp16")


def test_saving_options(text_pipe: Pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for option, message in (
        ({"safe_serialization": False}, "safetensors only"),
        ({"variant": "fp16"}, "Variants"),
        ({"max_shard_size": "1GB"}, "one file for each component"),
        ({"push_to_hub": True}, "needs repo_id"),
        ({"repo_id": "me/mine"}, "repo_id needs push_to_hub=True"),
        ({"private": True}, "Unknown keyword 'private'"),
        ({"dtypes": {"unet": torch.bfloat16}}, "Unknown component 'unet'"),
        ({"parts_of": {"unet": "icons"}}, "Unknown component 'unet'"),
        ({"parts_of": {"vq": "iconsx"}}, "shared with an embedded model, which 'iconsx' is not"),
        ({"parts_of": {"vq": 5}}, "shared with an embedded model, which 5 is not"),
        ({"parts_of": 5}, "parts_of must be a dictionary by component, not a int"),
        ({"dtypes": torch.bfloat16}, "dtypes must be a dictionary by component, not a dtype"),
        ({"dtypes": {5: torch.bfloat16}}, "Unknown component 5"),
    ):
        with pytest.raises(VisarError, match=message):
            text_pipe.save_pretrained(tmp_path / "no", **option)
    assert not (tmp_path / "no").exists()
    pushed: dict[str, Any] = {}

    class Hub:
        def __init__(self, token: Any = None):
            pushed["token"] = token

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            pushed.update(options)
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, **options: Any) -> None:
            pushed.update(options)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    text_pipe.save_pretrained(tmp_path / "yes", push_to_hub=True, repo_id="me/mine", private=True, token="t")
    assert pushed["repo_id"] == "me/mine" and pushed["private"] and pushed["token"] == "t"
    assert TextToImagePipeline.from_pretrained(tmp_path / "yes").config.guidance_scale == 2.0


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.int16, "not torch.int16"), (torch.float8_e8m0fnu, "not torch.float8_e8m0fnu"), ([1], r"not \[1\]"),
        ("nn", "not 'nn'"), (torch.float16, "'norm.weight' cannot be stored as torch.float16: it holds a number"),
        ("float8_e4m3fn", "'norm.weight' cannot be stored as torch.float8_e4m3fn"),
    ],
)  # fmt: skip
def test_a_dtype_that_no_file_has_leaves_a_good_folder(
    text_pipe: Pipe, tmp_path: Path, dtype: Any, message: str
) -> None:
    text_pipe.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with torch.no_grad():
        text_pipe.gpt.norm.weight[0] = 1e5  # more than float16 has
    for save in (
        lambda: text_pipe.save_pretrained(tmp_path, dtypes={"vq": torch.bfloat16, "gpt": dtype}),
        lambda: text_pipe.gpt.save_pretrained(tmp_path / "gpt", dtype),
    ):
        with pytest.raises(VisarError, match=message):
            save()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("bad", [None, 5, [1], b"x", "a\0b"])
def test_what_is_no_path_is_said(text_pipe: Pipe, tmp_path: Path, bad: Any) -> None:
    parts = (text_pipe.gpt, text_pipe.text_encoder)
    for use in (
        visar.load, text_pipe.save_pretrained, text_pipe.load_drafter, T5CaptionEncoder.from_pretrained,
        *(part.save_pretrained for part in parts), *(part.from_pretrained for part in parts),
    ):  # fmt: skip
        with pytest.raises(VisarError, match=r"must be a (name or a )?path, not (a \w+|'a\\x00b')\."):
            use(bad)
    for keyword in ("subfolder", "text_encoder", "vq", "vae") if bad is not None else ():
        with pytest.raises(VisarError, match=f"{keyword} must be a name or a path, not "):
            visar.load(tmp_path, **{keyword: bad})


def test_a_dtype_of_a_file_may_be_a_name_and_have_8_bits(text_pipe: Pipe, tmp_path: Path) -> None:
    text_pipe.save_pretrained(tmp_path, dtypes={"gpt": "bfloat16", "vq": torch.float8_e4m3fn})
    again = TextToImagePipeline.from_pretrained(tmp_path)
    assert torch.equal(again.gpt.norm.weight, text_pipe.gpt.norm.weight.bfloat16().float())


def test_components_make_the_same_pipeline(text_folder: Path, drafters: list[Path]) -> None:
    pipe = TextToImagePipeline.from_pretrained(text_folder)
    pipe.load_drafter(drafters[-1])
    for other in (TextToImagePipeline(**pipe.components), TextToImagePipeline.from_pipe(pipe)):
        other.set_progress_bar_config(disable=True)
        assert (other.config.guidance_scale, other.config.top_k) == (2.0, 0)
        assert torch.equal(tokens(other, sampler="speculative"), tokens(pipe, sampler="speculative"))
    scale = TextToImagePipeline.from_pipe(pipe, guidance_scale=np.float32(5)).config.guidance_scale
    assert scale == 5.0 and isinstance(scale, float)
    with pytest.raises(VisarError, match="have the same components"):
        TextToImagePipeline.from_pipe(pipe, torch_dtype=torch.bfloat16)
    with pytest.raises(VisarError, match="No family is made of the components gpt, text_encoder"):
        TextToImagePipeline(gpt=pipe.gpt, text_encoder=pipe.text_encoder)
    with pytest.raises(VisarError, match="called with a prompt"):
        ClassToImagePipeline(**pipe.components)


def test_loaders_of_diffusers_name_ours(text_folder: Path, class_folder: Path) -> None:
    for loader in (DiffusionPipeline, AutoPipelineForText2Image):
        with pytest.raises((AttributeError, ValueError), match=r"visar\.TextToImagePipeline"):
            loader.from_pretrained(text_folder)
    assert isinstance(visar.load(text_folder), TextToImagePipeline)
    assert isinstance(visar.load(class_folder), ClassToImagePipeline)
    assert isinstance(visar.load("icons-mar"), TextToImagePipeline)


def test_published_files_load_by_one_name(tmp_path: Path) -> None:
    torch.manual_seed(3)
    torch.save({"model": class_gpt().state_dict()}, tmp_path / "gpt.pt")
    torch.save({"model": VQModel(**VQ).state_dict()}, tmp_path / "vq.pt")
    pipe = visar.load(tmp_path / "gpt.pt", vq=tmp_path / "vq.pt", image_size=10, num_heads=2)
    assert isinstance(pipe, ClassToImagePipeline)


def test_the_package_shows_its_api() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = dir(visar)
    assert {"load", "TextToImagePipeline", "SamplingParams", "ImageModel", "SAMPLERS", "register_family"} <= set(names)
    assert all(getattr(visar, name) is not None for name in names)
