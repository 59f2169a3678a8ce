"""What pipelines of masked models refuse: parts that do not belong together, numbers that are not finite, settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pipelines.test_masked import (  # noqa: F401  (two are fixtures)
    FAST,
    GRID,
    class_mar,
    fast,
    masked_folder,
    pipe,
    small_vae,
    text_mar,
)  # fmt: skip
from visar.errors import VisarError
from visar.families.mar.session import MARSession
from visar.pipelines import TextToImagePipeline
from visar.samplers import HeadSpeculation, MaskedAutoregressive, get_sampler, samplers_for
from visar.text_encoders.words import WordEncoder

# ruff: noqa: F811 (fixtures that are imported)


def test_a_draft_model_must_belong_to_the_target(pipe: Any, tmp_path: Path) -> None:
    cases = {
        "another token grid: 4, not 3": text_mar(grid=4),
        "another token size: 2, not 4": text_mar(token_dim=2),
        "another kind of condition: class, not text": class_mar(),
        "trained on the latents of another autoencoder": text_mar(vae="0" * 16),
        "takes other conditions: caption_features 7, not 6": text_mar(caption_features=7),
        "begins at step 950, not at 500": text_mar(latest=950),
    }
    for i, (message, model) in enumerate(cases.items()):
        model.save_pretrained(tmp_path / str(i))
        with pytest.raises(VisarError, match=message):
            pipe.load_drafter(tmp_path / str(i))


def test_a_model_and_its_autoencoder_belong_together(words: WordEncoder) -> None:
    with pytest.raises(VisarError, match="tokens have 4 numbers, but the autoencoder's have 2"):
        TextToImagePipeline(mar=text_mar(), vae=small_vae(2), text_encoder=words)
    with pytest.raises(VisarError, match="another autoencoder"):
        TextToImagePipeline(mar=text_mar(vae="0" * 16), vae=small_vae(), text_encoder=words)


def test_a_model_and_its_text_encoder_belong_together(words: WordEncoder) -> None:
    with pytest.raises(VisarError, match="gives captions of 4 slots of 6 features, and the model takes 4 of 7"):
        TextToImagePipeline(mar=text_mar(caption_features=7), vae=small_vae(), text_encoder=words)
    with pytest.raises(VisarError, match="takes classes: it has no use for a text_encoder"):
        TextToImagePipeline(mar=class_mar(), vae=small_vae(), text_encoder=words)


def test_other_folders_are_no_draft_models(pipe: Any, text_folder: Path) -> None:
    with pytest.raises(VisarError, match="holds a LlamaGen, not a drafter; those are: MAR"):
        pipe.load_drafter(text_folder / "gpt")
    with pytest.raises(VisarError, match=r"holds no drafter: There is no .*config\.json"):
        pipe.load_drafter(text_folder)


def test_overflow_is_one_sentence(pipe: Any) -> None:
    for sampler in (MaskedAutoregressive(**FAST), HeadSpeculation(**FAST)):
        with pytest.raises(VisarError, match="Tokens are not finite"):
            pipe("red heart", sampler=sampler, guidance_scale=1e38)


@pytest.mark.parametrize(
    "layer",
    ["caption_proj.weight", "encoder_pos_embed_learned", "encoder_blocks.0.norm1.weight",
     "encoder_blocks.0.attn.qkv.weight", "decoder_blocks.0.mlp.fc2.weight", "diffloss.net.input_proj.weight",
     "diffloss.net.time_embed.mlp.0.weight", "diffloss.net.final_layer.linear.bias", "fake_latent",
     "decoder.conv_out.weight"],
)  # fmt: skip
def test_a_weight_that_is_not_finite_gives_no_image(pipe: Any, layer: str) -> None:
    tensors = {n: t for part in (pipe.mar, pipe.vae) for n, t in part.state_dict().items()}
    tensors[layer].flatten()[-1] = torch.nan
    for sampler in (MaskedAutoregressive(**FAST), HeadSpeculation(**FAST)):
        with pytest.raises(VisarError, match=f"not finite: {layer} holds NaN or infinity"):
            pipe("red heart", sampler=sampler)


def test_a_draft_model_that_is_not_finite_is_refused(pipe: Any) -> None:
    pipe.image_model.drafters.find("draft").z_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(VisarError, match=r"weights of the drafter are not finite: z_proj\.weight"):
        pipe("red heart", sampler=fast("cspd"))


@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize("name", samplers_for("continuous"))
def test_every_denoiser_call_is_checked(pipe: Any, name: str, draft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One number of one row in the second pass of the model, or of the draft model where there is one."""
    inner, calls = MARSession.context, 0

    def spoilt(self: MARSession, *arguments: Any) -> torch.Tensor:
        nonlocal calls
        out = inner(self, *arguments)
        if (self.draft is None) == draft or not name.startswith("cspd"):
            calls += 1
            out[-1, 0, 0] = torch.nan if calls == 2 else out[-1, 0, 0]
        return out

    monkeypatch.setattr(MARSession, "context", spoilt)
    seen: list[int] = []
    with pytest.raises(VisarError, match="Tokens are not finite"):
        pipe(["red heart", "cat"], sampler=fast(name), callback=lambda progress: seen.append(progress.passes))
    assert len(seen) <= 1  # it ends there


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, 1e38, -2e15])
def test_forced_tokens_are_numbers_or_nan(pipe: Any, bad: float) -> None:
    forced = torch.full((GRID**2, 4), torch.nan)
    forced[2] = bad
    for value in (
        forced,
        forced[:, :3],
        forced.isnan(),
        forced.nan_to_num(0.0, 1.0, 1.0).index_fill(1, torch.tensor(0), torch.nan),
    ):
        with pytest.raises(VisarError, match="forced_tokens must be"):
            pipe("red heart", sampler=MaskedAutoregressive(**FAST), forced_tokens=value)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn])
def test_tokens_to_decode_are_floats(pipe: Any, dtype: torch.dtype) -> None:
    with pytest.raises(VisarError, match=f"tokens must be a tensor of floating-point numbers, not {dtype}"):
        pipe.decode_tokens(torch.zeros(1, GRID**2, 4).to(dtype))


def test_a_sampler_without_its_draft_model_says_so(words: WordEncoder) -> None:
    pipe = TextToImagePipeline(mar=text_mar(), vae=small_vae(), text_encoder=words)
    with pytest.raises(VisarError, match="'cspd' needs a smaller MAR"):
        pipe("red heart", sampler="cspd")


def test_samplers_of_the_other_family_are_refused(pipe: Any, text_pipe: TextToImagePipeline) -> None:
    with pytest.raises(VisarError, match="'scd' is for discrete tokens"):
        pipe("red heart", sampler="scd")
    with pytest.raises(VisarError, match="'mar' is for continuous tokens"):
        text_pipe("red heart", sampler="mar")
    with pytest.raises(VisarError, match="guidance_schedule is for models of continuous tokens"):
        text_pipe("red heart", guidance_schedule="linear")
    for name, value in (("top_k", 5), ("top_p", 0.5), ("guidance_interval", 3)):
        with pytest.raises(VisarError, match=f"{name} is for models of discrete tokens"):
            pipe("red heart", sampler=MaskedAutoregressive(**FAST), **{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(sampler=("mar", dict(head_steps=1))), "head_steps must be from 2 to 1000, not 1"),
        (dict(sampler=("mar", dict(steps=10, head_steps=6))), "9 tokens are sampled in 1 to 9 passes, not 10"),
        (dict(sampler=("mar", dict(steps=0))), "steps must be 1 or more"),
        (dict(sampler=("mar-headspec", dict(draft=0))), "draft must be from 1 to 1000"),
        (dict(sampler=("cspd", dict(gamma=0))), "gamma must be 1 or more"),
        (dict(sampler=("cspd", dict(prefill=1.5))), "prefill must be a share"),
        (dict(sampler=("cspd", {}), temperature=0.0), "compares densities"),
        (dict(sampler=("mar", {}), temperature=-1.0), "temperature must be 0 or more, not -1"),
        (dict(sampler=("mar", FAST), temperature=0.001), "temperature must be 0, or 0.01 or more"),
        (dict(sampler=("mar", FAST), guidance_schedule="cosine"), "must be constant or linear, not 'cosine'"),
        (dict(sampler=("mar", FAST), guidance_scale=float("nan")), "guidance_scale must be a finite number"),
    ],
)
def test_bad_settings_are_one_sentence(pipe: Any, settings: dict[str, Any], message: str) -> None:
    name, parameters = settings.pop("sampler")
    with pytest.raises(VisarError, match=message):
        pipe("red heart", sampler=get_sampler(name, **parameters), **settings)
