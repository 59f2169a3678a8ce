"""What users of diffusers call works, or is refused by a sentence: each row of docs/diffusers.md on calls."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from visar.errors import VisarError
from visar.params import SamplingParams
from visar.samplers import SpeculativeJacobi

Pipe = Any


def tokens(pipe: Pipe, prompt: Any = "red heart", **settings: Any) -> torch.Tensor:
    return pipe(prompt, output_type="tokens", **settings).tokens


# Seeds


def test_a_generator_gives_the_seed(text_pipe: Pipe) -> None:
    first = text_pipe("red heart", generator=torch.Generator().manual_seed(5))
    again = text_pipe("red heart", generator=[torch.Generator().manual_seed(5)])
    assert torch.equal(first.tokens, again.tokens) and first.stats.seed == again.stats.seed
    assert torch.equal(tokens(text_pipe, seed=first.stats.seed), first.tokens)
    one = torch.Generator().manual_seed(5)
    assert tokens(text_pipe, generator=one).tolist() != tokens(text_pipe, generator=one).tolist()


def test_a_list_of_generators_gives_one_seed_for_each_image(text_pipe: Pipe) -> None:
    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(s) for s in seeds]

    seen: list[Any] = []
    out = text_pipe(["red heart", "cat"], generator=tuple(generators(3, 4)), callback=seen.append)
    assert len(out.images) == 2 and out.tokens.shape[0] == out.commit_pass.shape[0] == out.stats.images == 2
    assert {len(progress.tokens) for progress in seen} == {2}  # one batch, and not one image after the other
    alone = text_pipe("cat", generator=generators(4)[0])
    assert torch.equal(out.tokens[1:], alone.tokens) and out.stats.seed[1] == alone.stats.seed
    assert torch.equal(tokens(text_pipe, ["red heart", "cat"], seed=out.stats.seed), out.tokens)
    same = tokens(text_pipe, np.array(["cat", "cat"]), generator=generators(4, 4))
    assert torch.equal(same[0], same[1]) and torch.equal(same[:1], alone.tokens)
    shared = torch.Generator().manual_seed(3)
    assert torch.unique(tokens(text_pipe, num_images_per_prompt=2, generator=[shared] * 2), dim=0).shape[0] == 2
    assert torch.equal(
        tokens(text_pipe, seed=None, generator=generators(4)[0]), tokens(text_pipe, generator=generators(4))
    )
    with pytest.raises(VisarError, match="3 seeds for 2 images; give one, or one for each"):
        tokens(text_pipe, num_images_per_prompt=2, seed=[1, 2, 3])
    with pytest.raises(VisarError, match="seed must be a whole number, not 'a'"):
        tokens(text_pipe, seed=["a"])
    with pytest.raises(VisarError, match="seed or a generator, not both"):
        tokens(text_pipe, params=SamplingParams(seed=5), generator=generators(1)[0])
    with pytest.raises(VisarError, match="3 generators for 2 images"):
        text_pipe(["red heart", "cat"], generator=generators(1, 2, 3))
    with pytest.raises(VisarError, match=r"must be a torch.Generator, not a int"):
        text_pipe("cat", generator=7)
    with pytest.raises(VisarError, match="seed or a generator, not both"):
        text_pipe("cat", generator=generators(1), seed=2)


def test_no_seed_takes_a_random_one_and_reports_it(text_pipe: Pipe) -> None:
    a, b = (text_pipe("red heart", seed=None, output_type="tokens") for _ in range(2))
    assert a.stats.seed != b.stats.seed
    assert torch.equal(tokens(text_pipe, seed=a.stats.seed), a.tokens)


# Outputs and callbacks


def test_output_types(text_pipe: Pipe) -> None:
    array, latent, pt = (text_pipe("red heart", output_type=t) for t in ("np", "latent", "pt"))
    assert array.images.shape == (1, *pt.images.shape[2:], 3) and isinstance(array.images, np.ndarray)
    assert np.allclose(array.images.transpose(0, 3, 1, 2), pt.images.numpy())
    assert torch.equal(latent.images, latent.tokens)
    with pytest.raises(VisarError, match="output_type must be one of"):
        text_pipe("red heart", output_type="jpeg")


def test_a_tuple_or_a_dictionary(text_pipe: Pipe) -> None:
    out = text_pipe("red heart")
    images, ids, *_ = text_pipe("red heart", return_dict=False)
    assert images[0].tobytes() == out.images[0].tobytes() and torch.equal(ids, out.tokens)
    assert (
        out["images"] is out.images
        and out[1] is out.tokens
        and list(out) == ["images", "tokens", "commit_pass", "stats"]
    )


def test_callback_on_step_end(text_pipe: Pipe) -> None:
    seen: list[tuple[int, dict[str, Any]]] = []

    def tell(pipe: Any, step: int, timestep: int, tensors: dict[str, Any]) -> None:
        assert pipe is text_pipe
        seen.append((step, tensors))

    out = text_pipe("red heart", callback_on_step_end=tell, callback_on_step_end_tensor_inputs=["tokens"])
    assert [step for step, _ in seen] == list(range(len(seen))) and set(seen[0][1]) == {"tokens"}
    assert torch.equal(seen[-1][1]["tokens"], out.tokens)
    with pytest.raises(VisarError, match="Unknown callback tensor 'latents'"):
        text_pipe("red heart", callback_on_step_end=tell, callback_on_step_end_tensor_inputs=["latents"])
    # Diffusers' own examples return what they were given.
    text_pipe("red heart", callback_on_step_end=lambda pipe, step, time, tensors: tensors)
    assert torch.equal(
        tokens(text_pipe, callback_on_step_end=tell, callback_on_step_end_tensor_inputs=None), out.tokens
    )
    text_pipe("red heart", callback_on_step_end=tell, callback_on_step_end_tensor_inputs="tokens")
    assert set(seen[-1][1]) == {"tokens"}

    def changed(pipe: Any, step: int, timestep: int, tensors: dict[str, Any]) -> None:
        tensors["tokens"][0, 0] = 3

    def interrupt(pipe: Any, step: int, timestep: int, tensors: dict[str, Any]) -> None:
        pipe._interrupt = True

    for bad, message in (
        (lambda *_: {"tokens": 0}, "cannot change tokens"),
        (lambda *_: 3, "cannot change tokens, commit_pass"),
        (changed, "cannot change tokens"),
        (interrupt, "raise an exception to stop decoding"),
        (lambda progress: None, r"must be a function of \(pipe, step, timestep, tensors\)"),
        (3, "must be a function"),
        (dict, r"must be a function of .*, not <class 'dict'>"),
    ):
        with pytest.raises(VisarError, match=message):
            text_pipe("red heart", callback_on_step_end=bad)
    for names, message in ((5, "must be a list of names, not 5"), ([5], "Unknown callback tensor 5")):
        with pytest.raises(VisarError, match=message):
            text_pipe("red heart", callback_on_step_end=tell, callback_on_step_end_tensor_inputs=names)
    assert torch.equal(tokens(text_pipe), out.tokens)  # an interrupted call leaves no mark


def test_outputs_are_ordinary_tensors(text_pipe: Pipe) -> None:
    seen: list[Any] = []
    out = text_pipe("red heart", output_type="pt", callback=seen.append)
    for tensor in (
        out.images,
        out.tokens,
        out.commit_pass,
        seen[0].tokens,
        seen[0].preview(),
        text_pipe.decode_tokens(out.tokens),
    ):
        assert not tensor.is_inference()
    with torch.inference_mode():
        inside = text_pipe("red heart", output_type="pt")
    assert not inside.images.is_inference() and not text_pipe.decode_tokens(inside.tokens).is_inference()
    out.images.mul_(2)
    logits = torch.zeros(*out.tokens.shape, 24, requires_grad=True)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), out.tokens.flatten()).backward()
    (torch.ones(3, requires_grad=True)[:, None, None] * out.images).sum().backward()


# Arguments that have a meaning elsewhere


def test_arguments_of_other_pipelines(text_pipe: Pipe, class_pipe: Pipe) -> None:
    height, width = text_pipe.image_model.family.pixels
    assert torch.equal(tokens(text_pipe, height=height, width=width, negative_prompt=None), tokens(text_pipe))
    with pytest.raises(VisarError, match=f"height must be {height}: this model makes images of one size"):
        text_pipe("red heart", height=512)
    tokens(text_pipe, negative_prompt=[""])
    with pytest.raises(VisarError, match=r"negative_prompt has no meaning for this model.*guidance_scale"):
        text_pipe("red heart", negative_prompt="ugly")
    with pytest.raises(VisarError, match="num_inference_steps has no meaning for the sampler 'scd'"):
        text_pipe("red heart", num_inference_steps=30)
    with pytest.raises(VisarError, match=r"Unknown keyword 'guidance_scal'. Did you mean 'guidance_scale'"):
        text_pipe("red heart", guidance_scal=3)
    with pytest.raises(VisarError, match="Unknown keyword 'eta'"):
        class_pipe(1, eta=0.0)


@pytest.mark.parametrize(
    ("name", "value", "same"),
    [
        ("seed", np.int64(3), 3), ("seed", 3.0, 3), ("seed", torch.tensor(3), 3), ("top_k", np.float32(4), 4),
        ("guidance_scale", 3, 3.0), ("guidance_scale", torch.tensor(2.5), 2.5), ("temperature", np.float64(0.5), 0.5),
        ("window", np.int64(4), 4), ("window", 4.0, 4), ("window", torch.tensor(4), 4),
        ("first_image", np.int64(3), 3), ("first_image", np.array([3]), 3), ("seed", torch.tensor([3]), [3]),
        ("params", {"seed": 3}, SamplingParams(seed=3)), ("num_images_per_prompt", None, 1),
        ("sampler", SpeculativeJacobi(np.int64(4)), SpeculativeJacobi(4)),
        ("forced_tokens", [3.0, 4.0] + [-1.0] * 23, torch.tensor([3, 4] + [-1] * 23)),
        ("num_images_per_prompt", 2.0, 2), ("num_images_per_prompt", np.int32(2), 2),
        ("forced_tokens", [3, 4] + [-1] * 23, torch.tensor([3, 4] + [-1] * 23)),
        ("forced_tokens", np.array([3, 4] + [-1] * 23), torch.tensor([3, 4] + [-1] * 23)),
    ],
)  # fmt: skip
def test_numbers_of_any_library(text_pipe: Pipe, name: str, value: Any, same: Any) -> None:
    out, plain = (text_pipe("red heart", output_type="tokens", **{name: v}) for v in (value, same))
    assert torch.equal(out.tokens, plain.tokens)
    json.dumps(out.stats.to_dict())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", "a", "seed must be a whole number, not 'a'"),
        ("seed", True, "seed must be a whole number, not True"),
        ("top_k", 1.5, "top_k must be a whole number, not 1.5"),
        ("top_k", -1, "top_k must be 0 or more, not -1"),
        ("top_p", 0, "top_p must be above 0 and at most 1"),
        ("temperature", 0, "temperature must be above 0"),
        ("temperature", "hot", "temperature must be a number, not 'hot'"),
        ("guidance_scale", float("nan"), "guidance_scale must be a finite number"),
        ("num_images_per_prompt", 0, "The number of images must be 1 or more, not 0"),
        ("forced_tokens", [[1]], "forced_tokens must hold 25 whole numbers"),
        ("forced_tokens", ["x"], "forced_tokens must be a tensor or a list"),
        ("forced_tokens", [99] * 25, "below 24"),
        ("forced_tokens", torch.ones(25, dtype=torch.bool), "forced_tokens must be a tensor or a list"),
        ("window", "8", "window must be a whole number, not '8'"),
        ("window", 1.5, "window must be a whole number, not 1.5"),
        ("first_image", "a", "first_image must be a whole number, not 'a'"),
        ("first_image", 1.5, "first_image must be a whole number, not 1.5"),
        ("params", 3, "params must be a SamplingParams, not a int"),
        ("prompt", None, "No prompt was given"),
        ("prompt", 3, "A prompt is a text, not 3"),
        ("guidance_schedule", "linear", "guidance_schedule is for models of continuous tokens"),
    ],
)
def test_what_is_no_number_is_said(text_pipe: Pipe, name: str, value: Any, message: str) -> None:
    with pytest.raises(VisarError, match=message):
        text_pipe(**{"prompt": "red heart", name: value})


def test_params_and_keywords_say_the_same(text_pipe: Pipe) -> None:
    params = SamplingParams(seed=3, temperature=0.8, top_p=0.9)
    together = tokens(text_pipe, params=params)
    assert torch.equal(together, tokens(text_pipe, seed=3, temperature=0.8, top_p=0.9))
    assert torch.equal(tokens(text_pipe, params=params, seed=4), tokens(text_pipe, seed=4, temperature=0.8, top_p=0.9))
