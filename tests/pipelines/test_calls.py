"""Both pipelines on tiny random models: calls and outputs, what an image depends on, files, and errors."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from tests.helpers.tiny import GRID, VQ, class_gpt, text_gpt
from visar.errors import VisarError
from visar.families.llamagen.vq import VQModel
from visar.families.source import open_source
from visar.generation.model import ImageModel
from visar.pipelines import ClassToImagePipeline, TextToImagePipeline
from visar.text_encoders.t5 import T5CaptionEncoder

TOKENS, SIDE = GRID**2, 2 * GRID
Pipe = Any  # either pipeline


def tokens(pipe: Pipe, condition: Any, **settings: Any) -> torch.Tensor:
    return pipe(condition, output_type="tokens", **settings).tokens


# Files


def test_text_round_trip(text_pipe: TextToImagePipeline, tmp_path: Path) -> None:
    text_pipe.save_pretrained(tmp_path / "new" / "pipe")
    again = TextToImagePipeline.from_pretrained(tmp_path / "new" / "pipe")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(tokens(again, "red heart", seed=5), tokens(text_pipe, "red heart", seed=5))
    assert (
        again.config.guidance_scale == 2.0 and again.config.top_k == 0 and again.image_model.family.layout.rows == GRID
    )
    assert {p.name for p in (tmp_path / "new" / "pipe").iterdir()} == {"model_index.json", "gpt", "vq", "text_encoder"}


def test_class_round_trip(class_pipe: ClassToImagePipeline, tmp_path: Path) -> None:
    class_pipe.save_pretrained(tmp_path)
    again = ClassToImagePipeline.from_pretrained(str(tmp_path))
    again.set_progress_bar_config(disable=True)
    a, b = (pipe([3, 0], seed=5, output_type="pt") for pipe in (again, class_pipe))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.images, b.images)


def test_a_saved_folder_does_not_say_where_it_came_from(text_pipe: TextToImagePipeline, tmp_path: Path) -> None:
    text_pipe.save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.json"):
        assert "_name_or_path" not in json.loads(file.read_text()), file


def test_conversion(
    text_pipe: TextToImagePipeline,
    text_folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    assert text_pipe.to(torch.bfloat16) is text_pipe
    assert {p.dtype for m in (text_pipe.gpt, text_pipe.vq) for p in m.parameters()} == {torch.bfloat16}
    images = text_pipe("red heart", output_type="pt").images
    assert images.dtype == torch.float32 and images.isfinite().all()
    assert not caplog.records
    assert text_pipe.to("cpu", torch.float32).gpt.dtype == torch.float32
    for args, given in (
        (("cpu",), {"device": "meta"}), (("cpu", "cuda"), {}), ((torch.float32, torch.bfloat16), {}),
        ((torch.float32,), {"dtype": torch.bfloat16}), ((), {"dtype": torch.float32, "torch_dtype": torch.bfloat16}),
        (("cpu",), {"device": "cpu"}), (("cpu", torch.float32, "cpu"), {}),
    ):  # fmt: skip
        for moved in (text_pipe, text_pipe.image_model):
            with pytest.raises(VisarError, match="`to` takes one device and one dtype, not both"):
                moved.to(*args, **given)
    for given, message in (
        ({"device": "gpu"}, "Unknown device 'gpu'"), ({"device": "meta"}, "Device 'meta' is not supported"),
        ({"dtype": torch.int16}, "dtype must be a torch.dtype"), ({"non_blocking": True}, "keyword 'non_blocking'"),
    ):  # fmt: skip
        with pytest.raises(VisarError, match=message):
            text_pipe.image_model.to(**given)
    with pytest.raises(VisarError, match=r"Unknown keyword 'seed'\. Known: condition, ema"):
        ImageModel.load(text_folder, seed=1)
    with pytest.raises(VisarError, match="A Source has its options; give ema"):
        ImageModel.load(open_source(text_folder), ema=True)
    assert text_pipe.gpt.dtype == torch.float32
    half = TextToImagePipeline.from_pretrained(text_folder, torch_dtype=torch.bfloat16)
    assert half.gpt.dtype == half.vq.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "red", "heart", "car"])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    T5EncoderModel(T5Config(vocab_size=6, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(
        folder
    )
    return folder


def published(folder: Path, gpt: torch.nn.Module) -> dict[str, Any]:
    """Write the files nested as they are published; the arguments of `from_single_file`."""
    torch.manual_seed(3)
    torch.save({"model": gpt.state_dict(), "optimizer": {}, "steps": 7}, folder / "gpt.pt")
    torch.save({"ema": {}, "model": VQModel(**VQ).state_dict()}, folder / "vq.pt")
    return {"gpt": folder / "gpt.pt", "vq": folder / "vq.pt", "image_size": SIDE, "num_heads": 2}


def test_published_class_files(tmp_path: Path) -> None:
    gpt = class_gpt()
    pipe = ClassToImagePipeline.from_single_file(**published(tmp_path, gpt))
    pipe.set_progress_bar_config(disable=True)
    out = pipe([1, 6], guidance_scale=1.5)
    assert [im.size for im in out.images] == [(SIDE, SIDE)] * 2 and out.tokens.shape == (2, TOKENS)
    same = ClassToImagePipeline(gpt=gpt, vq=pipe.vq)
    same.set_progress_bar_config(disable=True)
    assert torch.equal(tokens(same, [1, 6], guidance_scale=1.5), out.tokens)
    assert (pipe.config.guidance_scale, pipe.config.top_k) == (4.0, 2000)
    with pytest.raises(VisarError, match=r"gpt\.pt is called with a class, not a prompt; give --class"):
        TextToImagePipeline.from_single_file(tmp_path / "gpt.pt", vq=tmp_path / "vq.pt", num_heads=2)
    with pytest.raises(VisarError, match="multiple of 2 pixels, not 9"):
        ClassToImagePipeline.from_single_file(tmp_path / "gpt.pt", vq=tmp_path / "vq.pt", image_size=9)


def test_published_text_files(t5_folder: Path, tmp_path: Path) -> None:
    files = published(tmp_path, text_gpt(length=6, features=16))
    pipe = TextToImagePipeline.from_single_file(**files, text_encoder=t5_folder)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.text_encoder, T5CaptionEncoder) and pipe.text_encoder.length == 6
    together = tokens(pipe, ["red heart", "car"])
    assert torch.equal(tokens(pipe, "car"), together[1:])
    pipe.save_pretrained(tmp_path / "saved")
    again = TextToImagePipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(tokens(again, ["red heart", "car"]), together)
    with pytest.raises(VisarError, match=r"gpt\.pt is called with a prompt, not a class; give prompts"):
        ClassToImagePipeline.from_single_file(**files)
    other = published(tmp_path, text_gpt(length=6, features=12))
    with pytest.raises(VisarError, match="gives captions of 6 slots of 16 features, and the GPT takes 6 of 12"):
        TextToImagePipeline.from_single_file(**other, text_encoder=t5_folder)


# Outputs


def test_output_types(text_pipe: TextToImagePipeline) -> None:
    pil, pt, none = (text_pipe(["red heart", "cat"], output_type=t) for t in ("pil", "pt", "tokens"))
    assert [type(im) for im in pil.images] == [Image.Image] * 2 and pil.images[0].size == (SIDE, SIDE)
    assert pil.images[0].mode == "RGB" and none.images is None
    assert pt.images.shape == (2, 3, SIDE, SIDE) and pt.images.min() >= 0 and pt.images.max() <= 1
    array = np.stack([np.asarray(im) for im in pil.images]).transpose(0, 3, 1, 2)
    assert np.array_equal(array, (pt.images * 255).round().numpy())
    assert torch.equal(pil.tokens, pt.tokens) and torch.equal(pil.tokens, none.tokens)
    assert pil.tokens.shape == (2, TOKENS) and pil.tokens.dtype == torch.long


def test_images_of_one_prompt(text_pipe: TextToImagePipeline) -> None:
    many = tokens(text_pipe, ["red heart", "cat"], num_images_per_prompt=3)
    assert len({tuple(row) for row in many.tolist()}) == 6
    assert torch.equal(tokens(text_pipe, "cat", num_images_per_prompt=2), many[3:5])


@pytest.mark.parametrize("sampler", ["ar", "sjd", "scd", "scd-gumbel"])
def test_a_image_depends_on_its_prompt_and_the_seed_alone(text_pipe: TextToImagePipeline, sampler: str) -> None:
    alone = tokens(text_pipe, "red heart", sampler=sampler, seed=2**40 + 1)
    among = tokens(text_pipe, ["cat", "red heart", "star", "red heart"], sampler=sampler, seed=2**40 + 1)
    assert torch.equal(among[1:2], alone)
    assert not torch.equal(among[3], among[1])  # the second image of this prompt
    assert not torch.equal(tokens(text_pipe, "red heart", sampler=sampler, seed=1), alone)


def test_classes_as_numbers_arrays_and_tensors(class_pipe: ClassToImagePipeline) -> None:
    wanted = tokens(class_pipe, [2, 2, 5])
    assert not torch.equal(wanted[0], wanted[1])
    for labels in (torch.tensor([2, 2, 5]), np.array([2, 2, 5]), (2, 2, 5)):
        assert torch.equal(tokens(class_pipe, labels), wanted)
    assert torch.equal(tokens(class_pipe, 5), wanted[2:])
    assert torch.equal(tokens(class_pipe, 2, num_images_per_prompt=2), wanted[:2])


def test_settings_reach_the_law(text_pipe: TextToImagePipeline) -> None:
    greedy = tokens(text_pipe, "cat", sampler="ar", top_k=1)
    for same in (dict(sampler="jacobi", top_k=1), dict(sampler="ar", top_p=1e-6), dict(sampler="ar", temperature=1e-5)):
        assert torch.equal(tokens(text_pipe, "cat", **same), greedy), same
    base = tokens(text_pipe, "cat", sampler="ar")
    assert torch.equal(tokens(text_pipe, "cat", sampler="ar", guidance_scale=2.0), base)  # the model's own
    guided = tokens(text_pipe, "cat", sampler="ar", guidance_scale=50.0)
    part = tokens(text_pipe, "cat", sampler="ar", guidance_scale=50.0, guidance_interval=4)
    assert not torch.equal(guided, base) and not torch.equal(part, guided) and torch.equal(part[0, :6], guided[0, :6])


# Errors


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("", {}, "The prompt is empty"),
        ("  ", {}, "The prompt is empty"),
        ([], {}, "No prompt was given"),
        (["cat", ""], {}, "The prompt is empty"),
        ("zebra", {}, "No word of the prompt 'zebra' is known"),
        (
            "cat",
            {"sampler": "sdj"},
            r"Unknown sampler 'sdj'\. Did you mean 'sjd'\? Known: ar, bild, blockwise, cool-sd, cspd, ",
        ),
        ("cat", {"num_images_per_prompt": 10**12, "output_type": "tokens"}, r"^10+ images at once need about .* GiB"),
        ("cat", {"seed": torch.tensor(1, device="meta")}, "seed must be a whole number, not tensor"),
        ("cat", {"top_p": torch.tensor(1.0, device="meta")}, "top_p must be a number, not tensor"),
        ("cat", {"invariant": np.array([True, False])}, "invariant must be true or false, not array"),
        ("cat", {"guidance_schedule": np.array(["a", "b"])}, "guidance_schedule must be constant or linear, not array"),
        ("cat", {"window": 1}, "window must be 2 or more tokens, not 1"),
        ("cat", {"sampler": "ar", "window": 8}, "'ar' has no parameter 'window'"),
        ("cat", {"temperature": 0.0}, r"temperature must be above 0 .*not 0\.0"),
        ("cat", {"temperature": -1}, r"temperature .*not -1"),
        ("cat", {"temperature": float("nan")}, r"temperature must be a finite number, not nan"),
        ("cat", {"top_p": 0.0}, r"top_p must be above 0 and at most 1, not 0\.0"),
        ("cat", {"top_p": 1.01}, r"top_p .* not 1\.01"),
        ("cat", {"top_k": -1}, "top_k must be 0 .* not -1"),
        ("cat", {"guidance_scale": float("inf")}, "guidance_scale must be a finite number, not inf"),
        ("cat", {"output_type": "png"}, "output_type must be one of pil, pt, np, latent, tokens, not 'png'"),
        ("cat", {"guidance_scale": 1e39}, r"guidance_scale must be from -1e\+38 to 1e\+38, not 1e\+39"),
        ("cat", {"temperature": 1e39}, r"temperature must be at most 1e\+38, not 1e\+39"),
        ("cat", {"temperature": 1e-30}, r"temperature must be above 0 \(1e-05 at least"),
        ("cat", {"guidance_scale": 10**400}, "guidance_scale must be a finite number, not a number of 1329 bits"),
        ("cat", {"temperature": -(10**5000)}, "temperature must be a finite number, not a number of 16610 bits"),
        ("cat", {"seed": 10**5000}, "seed must be from 0 to 18446744073709551615, not a number of 16610 bits"),
        ("cat", {"guidance_interval": 2**63}, "guidance_interval must be from -1 to 9223372036854775807"),
        ([10**5000], {}, "A prompt is a text, not a number of 16610 bits"),
        ("cat", {"window": 10**400}, "window must be a whole number of 64 bits, not a number of 1329 bits"),
        ("cat", {"window": -(10**5000)}, "window must be a whole number of 64 bits, not a number of 16610 bits"),
        (
            "cat",
            {"num_images_per_prompt": 10**400},
            "of images must be a whole number of 64 bits, not a number of 1329",
        ),
        ("cat", {"num_images_per_prompt": -(10**5000)}, "a whole number of 64 bits, not a number of 16610 bits"),
        ("cat", {"callback": 5}, r"callback must be a function of \(progress\), not 5"),
        ("cat", {"callback": lambda: None}, r"callback must be a function of \(progress\), not <function"),
        ("cat", {"callback": dict}, r"callback must be a function of \(progress\), not <class 'dict'>"),
        ("cat", {"params": {5: 1}}, "Unknown setting 5"),
        ("cat", {"num_images_per_prompt": 0}, "The number of images must be 1 or more, not 0"),
        ("cat", {"num_images_per_prompt": True}, "num_images_per_prompt must be a whole number, not True"),
        ("cat", {"top_k": True}, "top_k must be a whole number, not True"),
        ("cat", {"top_p": True}, "top_p must be a number, not True"),
        ("cat", {"seed": True}, "seed must be a whole number, not True"),
        ("cat", {"seed": -1}, "seed must be from 0 to 18446744073709551615, not -1"),
        ("cat", {"first_image": True}, "first_image must be a whole number, not True"),
        ("cat", {"forced_tokens": -7}, r"forced_tokens must hold 25 whole numbers, .* of shape \[\] down to -7"),
        ("cat", {"forced_tokens": [-7] * 25}, "forced_tokens must hold 25 whole numbers, .* down to -7"),
        ("cat", {"forced_tokens": [-1] * 24 + [24]}, "each -1 or a token below 24"),
        ("cat", {"forced_tokens": [[-1] * 25]}, r"not int64 of shape \[1, 25\]"),
        ("cat", {"forced_tokens": [-0.5] * 25}, "25 whole numbers, .* not float32"),
        ("cat", {"forced_tokens": [True] * 25}, "forced_tokens must be a tensor or a list of token ids"),
        ("cat", {"forced_tokens": [10**30] * 25}, "forced_tokens must be a tensor or a list of token ids"),
        ("cat", {"forced_tokens": [1e38] * 25}, "forced_tokens must be a tensor or a list of token ids"),
        ("cat", {"forced_tokens": np.full(25, 2**64 - 1)}, "forced_tokens must be a tensor or a list of token ids"),
        ("cat", {"forced_tokens": ["a"] * 25}, "forced_tokens must be a tensor or a list of token ids"),
    ],
)
def test_bad_calls(text_pipe: TextToImagePipeline, prompt: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(VisarError, match=message):
        text_pipe(prompt, **settings)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.uint16, torch.uint64])
def test_tokens_of_any_whole_numbers_are_decoded(text_pipe: TextToImagePipeline, dtype: torch.dtype) -> None:
    ids = torch.arange(TOKENS)[None] % 24
    assert torch.equal(text_pipe.decode_tokens(ids.to(dtype)), text_pipe.decode_tokens(ids))
    assert torch.equal(tokens(text_pipe, "cat", forced_tokens=ids[0].to(dtype)), ids)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.complex64, torch.float8_e4m3fn])
def test_tokens_that_are_no_whole_numbers(text_pipe: TextToImagePipeline, dtype: torch.dtype) -> None:
    with pytest.raises(VisarError, match=f"tokens must be a tensor of whole numbers, not {dtype}"):
        text_pipe.decode_tokens(torch.zeros(1, TOKENS, dtype=dtype))


def test_tokens_that_no_image_has(text_pipe: TextToImagePipeline) -> None:
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    for bad in (-1, 9999):
        with pytest.raises(VisarError, match=f"no image token, such as {bad}"):
            text_pipe.decode_tokens(ids.index_fill(1, torch.tensor(2), bad))
    for other in (ids.to("meta"), ids.to_sparse()):
        with pytest.raises(VisarError, match=r"must be a tensor \[B, .*\], not one without values"):
            text_pipe.decode_tokens(other)
        with pytest.raises(VisarError, match="forced_tokens must be a tensor or a list"):
            text_pipe("cat", forced_tokens=other)
    with pytest.raises(VisarError, match="A prompt is a text, not 5"):
        text_pipe.image_model.decode_tokens(ids, 5)  # type: ignore[arg-type]
    with pytest.raises(VisarError, match="2 conditions for 1 images"):
        text_pipe.image_model.decode_tokens(ids, ["cat", "dog"])


def test_unknown_kinds_of_weights(text_pipe: TextToImagePipeline) -> None:
    for bad in (None, 8, [1], "int7"):
        with pytest.raises(VisarError, match=r"Unknown kind of weights .* Known: fp8, int8, native"):
            text_pipe.quantize(bad)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (7, "Class 7 does not exist; this model knows 0 to 6"),
        ([10**5000], "Class a number of 16610 bits does not exist"),
        ([0, -1], "Class -1 does not"),
        ([], "No class was"),
        (True, "Classes are whole numbers, not True"),
        ([1, np.True_], "Classes are whole numbers, not True"),
        (torch.tensor(True), "Classes are whole numbers, not True"),
        ([1, 2.0], r"Classes are whole numbers, not 2\.0"),
        ([1, None], "Classes are whole numbers, not None"),
    ],
)
def test_bad_classes(class_pipe: ClassToImagePipeline, labels: Any, message: str) -> None:
    with pytest.raises(VisarError, match=message):
        class_pipe(labels)


def test_image_indices_one_by_one(text_pipe: TextToImagePipeline) -> None:
    """Images of any indices in one call are those of calls of their own."""
    together = text_pipe(["cat", "dog", "cat"], first_image=[5, 0, 2], output_type="tokens").tokens
    for row, (prompt, index) in enumerate((("cat", 5), ("dog", 0), ("cat", 2))):
        assert torch.equal(text_pipe(prompt, first_image=index, output_type="tokens").tokens[0], together[row])
    with pytest.raises(VisarError, match="one for each of the 2 images, not 1"):
        text_pipe(["cat", "dog"], first_image=[1])
    with pytest.raises(VisarError, match="Image indices of one prompt go from 0"):
        text_pipe(["cat", "dog"], first_image=[1, -1])
