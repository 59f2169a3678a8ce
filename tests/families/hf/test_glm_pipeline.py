"""GLM-Image with pixels: the stock `GlmImagePipeline` of diffusers, beside it visar's codes, and folders of all parts.

Where the stock pipeline is wrong, a test shows it next to the right value.
"""

from __future__ import annotations

import copy
import functools
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import visar
from tests.helpers.tiny_glm import CODES, glm, small_drafts, stock_glm, tiny_glm, tiny_pipeline
from tests.helpers.tiny_hf import PROMPTS
from visar import cli
from visar.errors import VisarError
from visar.families.hf.glm_pipeline import GlmPixels
from visar.generation.model import ImageModel
from visar.recipe import Recipe

SIZE: dict[str, Any] = {"height": 64, "width": 96}  # 2 x 3 codes
STEPS: dict[str, Any] = {"num_inference_steps": 1, "output_type": "pt"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_drafts(monkeypatch)


@functools.cache
def stock() -> Any:
    return tiny_pipeline()


@pytest.fixture
def fast() -> Any:
    return visar.accelerate(stock())


@pytest.fixture
def priors() -> Iterator[list[torch.Tensor]]:
    """The codes that the diffusion transformer was given, [B, 4HW] for each of its passes."""
    seen: list[torch.Tensor] = []

    def see(module: Any, args: Any, given: dict[str, Any]) -> None:
        seen.append(given["prior_token_id"])

    handle = stock().transformer.register_forward_pre_hook(see, with_kwargs=True)
    yield seen
    handle.remove()


@pytest.fixture
def codes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock model samples codes alone, as what it does with others is tested once."""
    every = glm()[0].config.text_config.vision_vocab_size
    monkeypatch.setattr(glm()[0].generation_config, "suppress_tokens", list(range(CODES, every)))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_threads_take_turns() -> None:
    """Two of a server would share the steps that the scheduler counts."""
    inside, most = [0], [0]

    def pipeline(**_: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.05)
        inside[0] -= 1
        return SimpleNamespace(images=torch.zeros(1, 3, 4, 4))

    family = SimpleNamespace(pixels=(4, 4), device="cpu", prior_token_ids=lambda tokens: tokens)
    draw, tokens = GlmPixels(pipeline), torch.zeros(1, 4, dtype=torch.long)
    with ThreadPoolExecutor(3) as pool:
        assert len(list(pool.map(lambda _: draw(family, ["cat"], tokens), range(3)))) == 3 and most == [1]


def test_it_is_the_pipeline_with_codes_of_visar(fast: Any) -> None:
    ids = fast.prior_token_ids(PROMPTS[:2], **SIZE, generator=seeded(3))
    wanted = stock()(list(PROMPTS[:2]), prior_token_ids=ids, generator=seeded(3), guidance_scale=2.0, **SIZE, **STEPS)
    found = fast(list(PROMPTS[:2]), generator=seeded(3), guidance_scale=2.0, **SIZE, **STEPS)
    assert type(found) is type(wanted) and torch.equal(found.images, wanted.images)
    (plain,) = fast(list(PROMPTS[:2]), generator=seeded(3), guidance_scale=2.0, return_dict=False, **SIZE, **STEPS)
    assert torch.equal(plain, wanted.images)
    assert fast.stats.sampler == "scd" and fast.stats.tokens_per_pass > 0
    given = fast(PROMPTS[0], prior_token_ids=ids[:1], generator=seeded(3), **SIZE, **STEPS)
    assert torch.equal(
        given.images, stock()(PROMPTS[0], prior_token_ids=ids[:1], generator=seeded(3), **SIZE, **STEPS).images
    )


@pytest.mark.usefixtures("codes_alone")
def test_greedy_codes_are_those_of_the_stock_pipeline(fast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = glm()[0]
    with monkeypatch.context() as greedy:
        greedy.setattr(model.generation_config, "top_k", 1)
        wanted, *_ = stock().generate_prior_tokens(list(PROMPTS), **SIZE)
    for sampler in ("ar", "scd"):
        assert torch.equal(fast.prior_token_ids(list(PROMPTS), **SIZE, sampler=sampler, top_k=1), wanted)


@pytest.mark.usefixtures("codes_alone")
def test_every_image_and_every_seed_has_codes_of_its_own(fast: Any, priors: list[torch.Tensor]) -> None:
    """The stock pipeline makes all images of a prompt from the codes of one, and of a list of generators takes one."""
    stock()(PROMPTS[0], num_images_per_prompt=2, generator=[seeded(1), seeded(2)], **SIZE, **STEPS)
    assert torch.equal(priors[-1][0], priors[-1][1])
    fast(PROMPTS[0], num_images_per_prompt=2, generator=[seeded(1), seeded(2)], **SIZE, **STEPS)
    pair = priors[-1]
    assert not torch.equal(pair[0], pair[1])
    for seed, codes in ((1, pair[0]), (2, pair[1])):  # each is the one that its generator gives alone
        fast(PROMPTS[0], generator=seeded(seed), **SIZE, **STEPS)
        assert torch.equal(priors[-1][0], codes)
    fast(list(PROMPTS[:2]), num_images_per_prompt=2, generator=seeded(1), **SIZE, **STEPS)
    assert priors[-1].shape == (4, 4 * 6) and len(priors[-1].unique(dim=0)) == 4
    assert torch.equal(priors[-1][0], pair[0])


def test_an_end_too_early_breaks_the_stock_pipeline() -> None:
    model = tiny_glm(seed=1)
    with torch.no_grad():  # the end of an image is likely anywhere
        model.lm_head.weight[CODES + 1] = 3 * model.lm_head.weight[:CODES].abs().max()
    broken = tiny_pipeline(model)
    with pytest.raises((RuntimeError, IndexError)):
        broken(PROMPTS[0], generator=seeded(0), **SIZE, **STEPS)
    out = visar.accelerate(broken)(PROMPTS[0], generator=seeded(0), **SIZE, **STEPS)
    assert out.images.shape == (1, 3, 64, 96)


@pytest.mark.usefixtures("codes_alone")
def test_sizes_off_the_grid_and_none(fast: Any) -> None:
    """The stock pipeline makes 132 pixels 128 in silence, and fails on no size."""
    assert stock()(PROMPTS[2], height=64, width=100, **STEPS).images.shape[-1] == 96
    with pytest.raises(VisarError, match="multiples of 32 pixels, not 64 and 100"):
        fast(PROMPTS[2], height=64, width=100, **STEPS)
    with pytest.raises(Exception, match=r"target_h|NoneType"):
        stock()(PROMPTS[2], **STEPS)
    assert fast.prior.image_model.family.pixels == (1024, 1024)
    assert fast.prior_token_ids("cat", width=32, height=32 * 2).shape == (1, 8)


def test_pixels_of_prompt_and_codes(fast: Any) -> None:
    """In visar's own pipeline an image is a function of prompt and codes, in any batch."""
    pipe = fast.prior
    pipe.image_model.family.draw.arguments = {"num_inference_steps": 1}
    out = pipe(["a 'sign'", "cat"], seed=[4, 5], output_type="pt", **SIZE)
    assert out.images.shape == (2, 3, 64, 96) and not torch.equal(out.images[0], out.images[1])
    for i, text in enumerate(("a 'sign'", "cat")):
        assert torch.equal(pipe(text, seed=4 + i, output_type="pt", **SIZE).images[0], out.images[i])
    model = pipe.image_model.sized(64, 96)
    assert torch.equal(model.decode_tokens(out.tokens, ["a 'sign'", "cat"]), out.images)
    assert not torch.equal(model.decode_tokens(out.tokens)[0], out.images[0])  # without the glyphs of 'sign'
    assert torch.equal(copy.deepcopy(model).decode_tokens(out.tokens, ["a 'sign'", "cat"]), out.images)
    seen: list[Any] = []
    pipe("cat", seed=4, callback=seen.append, output_type="tokens", **SIZE)
    assert seen[-1].preview().shape == (1, 2, 3, 3)


def test_the_command_line_makes_images_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock().save_pretrained(folder := tmp_path / "glm")
    monkeypatch.setattr("visar.families.hf.glm_pipeline.ARGUMENTS", {"num_inference_steps": 1})
    model = ["--model", str(folder), "--image-size", "96x64"]
    assert cli.main(["generate", "cat", *model, "-o", str(tmp_path / "a.png")]) == 0
    assert Image.open(tmp_path / "a.png").size == (96, 64)
    assert "--image-size 96x64" in Recipe.read(tmp_path / "a.png").command()
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    run = ["sample", "--prompts", str(tmp_path / "prompts.txt"), *model, "-n", "3", "--out", str(tmp_path / "many")]
    assert cli.main(run) == 0 and len(list((tmp_path / "many").glob("*.png"))) == 3
    assert cli.main([*run, "--image-size", "64"]) == 2  # a run of another size
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    with pytest.raises(VisarError, match="Could not load the parts that make pixels"):
        visar.load(folder)("cat", **SIZE)
    shutil.rmtree(folder / "vae")
    loaded = ImageModel.load(folder)
    with pytest.raises(VisarError, match="has no vae to make pixels with"):
        loaded.generate("cat")


def test_what_is_refused(fast: Any) -> None:
    def refused(match: str, *args: Any, **keywords: Any) -> None:
        with pytest.raises(VisarError, match=match) as caught:
            fast(*args, **SIZE | STEPS | keywords)
        assert "\n" not in str(caught.value)

    refused("visar makes images of prompts", "cat", image=[Image.new("RGB", (64, 64))])
    refused("cannot be called so: got an unexpected keyword argument 'steps'", "cat", steps=3)
    refused("Give a prompt, or prior_token_ids")
    refused("There are 3 seeds for 2 images", ["cat", "dog"], generator=[seeded(i) for i in range(3)])
    refused("generator must be a torch.Generator, not a int", "cat", generator=3)
    refused("prior_token_ids are given, so sampler has no meaning", "cat", sampler="ar", prior_token_ids=torch.ones(1))
    refused("window", "cat", window=0)
    with pytest.raises(VisarError, match="has its processor; give the pipeline alone"):
        visar.accelerate(stock(), glm()[1])
    assert len(stock_glm(*glm(), PROMPTS[:1], **SIZE)) == 1  # and the stock decoder is as it was
