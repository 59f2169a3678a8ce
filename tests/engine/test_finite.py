"""Nothing is sampled from what is no distribution: weights, every pass of every sampler, drafters, and pixels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.worlds import made, run, session_of, world
from visar.cli import main
from visar.engine.callable_session import CallableSession
from visar.engine.finite import is_finite
from visar.engine.layout import Layout
from visar.engine.loop import Snapshot, decode
from visar.engine.quantization import rounded
from visar.engine.rng import Noise
from visar.errors import VisarError
from visar.pipelines import TextToImagePipeline
from visar.samplers import Target, samplers_for

IMAGES = torch.arange(2)
BAD = {"NaN": torch.nan, "infinity": torch.inf}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_is_asked_of_every_entry_and_overflows_for_none(dtype: torch.dtype) -> None:
    x = torch.full((3, 1001), torch.finfo(dtype).max, dtype=dtype)
    x[1] *= -1
    assert bool(is_finite(x)) and bool(is_finite(x[:0])) and bool(is_finite(torch.arange(3)))
    for bad in (torch.nan, torch.inf, -torch.inf):
        for at in (0, 1000):
            spoilt = x.clone()
            spoilt[2, at] = bad
            assert not bool(is_finite(spoilt)) and not bool(is_finite(spoilt.T))


# Weights

WEIGHTS = {
    "embedding": "tok_embeddings.weight",
    "caption projector": "cls_embedding.cap_proj.fc1.weight",
    "unconditional caption": "cls_embedding.uncond_embedding",
    "norm": "layers.0.attention_norm.weight",
    "attention": "layers.0.attention.wqkv.weight",
    "mlp": "layers.1.feed_forward.w2.weight",
    "last norm": "norm.weight",
    "head": "output.weight",
    "codebook": "quantize.embedding.weight",
    "tokenizer decoder": "decoder.conv_out.weight",
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("layer", WEIGHTS)
def test_a_weight_that_is_not_finite_gives_no_image(text_pipe: TextToImagePipeline, layer: str, bad: float) -> None:
    tensors = {n: t for part in (text_pipe.gpt, text_pipe.vq) for n, t in part.state_dict().items()}
    tensors[WEIGHTS[layer]].flatten()[-1] = bad
    for sampler in ("ar", "scd"):
        with pytest.raises(VisarError, match=f"not finite: {WEIGHTS[layer]} holds NaN or infinity"):
            text_pipe("red heart", sampler=sampler)


def test_a_drafter_that_is_not_finite_is_refused(text_pipe: TextToImagePipeline, drafters: list[Path]) -> None:
    for folder, sampler in zip(drafters, ("eagle", "medusa", "hydra", "kangaroo"), strict=False):
        text_pipe.load_drafter(folder)
        drafter = text_pipe.image_model.drafters.loaded[folder.name]
        next(drafter.parameters()).data.view(-1)[0] = torch.nan
        with pytest.raises(VisarError, match="weights of the drafter are not finite"):
            text_pipe("cat", sampler=sampler)


def test_eight_bits_do_not_hide_a_weight() -> None:
    with pytest.raises(VisarError, match="weights to be rounded are not finite"):
        rounded(torch.tensor([[1.0, torch.nan]]), "int8")


# Passes


def spoil(owner: Any, method: str, call: int, values: float, column: int | None = None) -> None:
    """The `call`-th logits that a method gives are `values` at the first position of the last row."""
    inner, calls = getattr(owner, method), 0

    def spoilt(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        logits = inner(*arguments)
        if calls == call:
            logits = logits.clone()
            logits[-1, 0, slice(None) if column is None else column] = values
        return logits

    setattr(owner, method, spoilt)


@pytest.mark.parametrize("kind", ["NaN", "infinity", "nothing allowed"])
@pytest.mark.parametrize("name", samplers_for("discrete"))
def test_every_pass_is_checked(name: str, kind: str) -> None:
    """One logit of one row in the first pass, of which no later pass shows anything."""
    sampler, target = made(name), Target(top_k=3)
    if name == "zipar":
        sampler = replace(sampler, layout=Layout(2, 2))
    session = session_of(world("text"), sampler, IMAGES)
    for method in ("forward", "forward_at"):
        spoil(session, method, 1, BAD.get(kind, -torch.inf), 1 if kind in BAD else None)
    with pytest.raises(VisarError, match="The model gave no distribution: its logits are not finite"):
        decode(session, sampler, target, Noise(0, IMAGES))


@pytest.mark.parametrize("name", [n for n, spec in samplers_for("discrete").items() if spec.drafter])
@pytest.mark.parametrize("method", ["root", "extend"])
def test_every_draft_distribution_is_checked(name: str, method: str) -> None:
    sampler = made(name)
    session = session_of(world("text"), sampler, IMAGES)
    spoil(session.drafter, method, 1, torch.nan, 0)
    with pytest.raises(VisarError, match="The drafter gave no distribution"):
        decode(session, sampler, Target(), Noise(0, IMAGES))


def test_positions_past_the_end_may_hold_anything() -> None:
    sampler = made("scd", window=8)
    session = session_of(world("text"), sampler, IMAGES)
    inner = session.forward

    def forward(*arguments: Any) -> Tensor:
        past = (session.positions(8) >= session.length)[..., None]
        return inner(*arguments).masked_fill(past, torch.nan)

    wanted = run(world("text"), sampler, IMAGES, Target()).tokens
    session.forward = forward  # type: ignore[method-assign]
    assert torch.equal(decode(session, sampler, Target(), Noise(0, IMAGES)).tokens, wanted)


def test_keys_that_attention_gives_no_weight_are_found() -> None:
    session = session_of(world("text"), made("ar"), IMAGES)
    decode(session, made("ar"), Target(), Noise(0, IMAGES))
    session.check()
    session.cache.keys[1, 2, 3, 0] = -torch.inf
    with pytest.raises(VisarError, match="keys and values are not finite in float32"):
        session.check()


def test_logits_too_large_for_the_temperature() -> None:
    def logits(tokens: Tensor) -> Tensor:
        return torch.tensor([1.0, 1e34, -1e34]).expand(len(tokens), tokens.shape[1] + 1, 3)

    for name in ("ar", "scd", "scd-gumbel", "jacobi"):
        with pytest.raises(VisarError, match="too large for the guidance scale and temperature 1e-05"):
            decode(CallableSession(logits, 2, 5, 3), made(name), Target(1e-5), Noise(0, IMAGES))
    assert bool((decode(CallableSession(logits, 2, 5, 3), made("ar"), Target(), Noise(0, IMAGES)).tokens == 1).all())


def test_no_callback_sees_what_was_not_sampled() -> None:
    session, seen = session_of(world("text"), made("ar"), IMAGES), list[Snapshot]()
    spoil(session, "forward", 2, torch.nan)
    with pytest.raises(VisarError, match="no distribution"):
        decode(session, made("ar"), Target(), Noise(0, IMAGES), seen.append)
    assert [now.passes for now in seen] == [1]


# Pixels and the command line


def test_pixels_that_are_not_finite_are_no_image(
    text_pipe: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = text_pipe.image_model.family
    monkeypatch.setattr(family, "decode", lambda tokens: torch.full((len(tokens), 3, 10, 10), torch.nan))
    for kind in ("pil", "np", "pt"):
        with pytest.raises(VisarError, match="decoder's pixels are not finite"):
            text_pipe("cat", output_type=kind)
    assert text_pipe("cat", output_type="tokens").tokens.shape == (1, 25)


def test_an_overflow_is_exit_code_2(text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["generate", "cat", "--model", str(text_folder), "-o", str(tmp_path / "cat.png"), "--sampler"]
    for sampler in ("ar", "scd"):
        assert main([*given, sampler, "--guidance-scale", "1e38", "--temperature", "1e-5"]) == 2
        assert "The model gave no distribution" in capsys.readouterr().err
    assert main([*given, "ar", "--guidance-scale", "1e39"]) == 2
    assert "guidance-scale must be from -1e+38 to 1e+38, not 1e+39." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
