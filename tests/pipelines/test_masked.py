"""Pipelines of masked models, on tiny random ones: what users call, save, load, and are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from visar.cli import main
from visar.errors import VisarError
from visar.families.mar.autoencoder import KLAutoencoder, fingerprint
from visar.families.mar.transformer import MAR
from visar.pipelines import (
    ClassToImagePipeline,
    TextToImagePipeline,
)
from visar.samplers import ContinuousSpeculative, HeadSpeculation, MaskedAutoregressive, samplers_for, spec_of
from visar.text_encoders.concepts import Concepts, concepts
from visar.text_encoders.words import WordEncoder
from visar.training.mar import initialise

GRID = 3
# The noisiest head steps are left out: a random head would make tokens of any size there.
SMALL: dict[str, Any] = dict(token_dim=4, grid=GRID, dim=32, encoder_layers=1, decoder_layers=1, num_heads=2,
                             head_width=32, head_layers=1, latest=500)  # fmt: skip
FAST = dict(steps=4, head_steps=6)
QUICK = ("mar", "mar-headspec", "cspd-exact")  # the others are much like these


def text_mar(seed: int = 0, **other: Any) -> MAR:
    torch.manual_seed(seed)
    sizes = SMALL | dict(condition="text", buffer=4, caption_features=6) | other
    return tame(initialise(MAR(**sizes)))


def class_mar(**other: Any) -> MAR:
    torch.manual_seed(1)
    return tame(initialise(MAR(**SMALL | dict(condition="class", classes=5, buffer=2) | other)))


def tame(mar: MAR) -> MAR:
    """Weights that are not zero."""
    for p in mar.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return mar.eval()


def small_vae(latents: int = 4) -> Any:
    torch.manual_seed(2)
    return KLAutoencoder((8, 8), 1, latents, 4, attention=False, scaling_factor=0.5).eval()


@pytest.fixture(scope="module")
def masked_folder(words: WordEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masked") / "text"
    vae = small_vae()
    pipe = TextToImagePipeline(mar=text_mar(vae=fingerprint(vae)), vae=vae, text_encoder=words, guidance_scale=2.0)
    text_mar(3, vae=fingerprint(vae)).save_pretrained(folder.with_name("small"))
    pipe.load_drafter(folder.with_name("small"))
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(masked_folder: Path) -> Any:
    made = TextToImagePipeline.from_pretrained(masked_folder)
    made.set_progress_bar_config(disable=True)
    return made


def fast(name: str) -> Any:
    made: Any = spec_of(name).make()
    if isinstance(made, ContinuousSpeculative):
        return ContinuousSpeculative(gamma=2, head_steps=6, factor=made.factor, nested=made.nested)
    kind = HeadSpeculation if isinstance(made, HeadSpeculation) else MaskedAutoregressive
    return kind(**FAST, last_head_steps=min(3, made.last_head_steps))


def test_the_front_loads_the_masked_family(pipe: Any) -> None:
    assert type(pipe) is TextToImagePipeline and pipe.image_model.family.pixels == (6, 6)
    with pytest.raises(VisarError, match=r"is called with a prompt, not a class; give prompts"):
        ClassToImagePipeline.from_pretrained(pipe.image_model.folder)


@pytest.mark.parametrize("name", samplers_for("continuous"))
def test_every_sampler_draws_and_says_what_it_did(pipe: Any, name: str) -> None:
    out = pipe(["red heart", "blue cat"], sampler=fast(name), num_images_per_prompt=2)
    stats = out.stats
    assert [i.size for i in out.images] == [(6, 6)] * 4 and out.tokens.shape == (4, GRID**2, 4)
    assert stats.exact == spec_of(name).exact and stats.exactness == spec_of(name).exactness
    assert stats.nfe == max(stats.passes_per_image) == int(out.commit_pass.max()) + 1
    assert (out.commit_pass >= 0).all() and stats.denoiser_calls > 0
    assert json.loads(json.dumps(stats.to_dict()))["denoiser_calls"] == stats.denoiser_calls
    assert name.split("-")[0] in str(stats)


def test_plain_decoding_counts_all_head_steps_and_speculation_fewer(pipe: Any) -> None:
    plain = pipe("red heart", sampler=MaskedAutoregressive(steps=4, head_steps=40)).stats
    fewer = pipe("red heart", sampler=HeadSpeculation(steps=4, head_steps=40)).stats
    # Of 40 steps those above the model's `latest` are one.
    assert plain.calls_per_pass == plain.evaluations_per_token == plain.denoising_steps == 21
    assert plain.acceptance is None
    assert fewer.calls_per_pass < 21 < fewer.evaluations_per_token and 0 < fewer.acceptance < 1


def test_a_image_depends_on_seed_and_prompt_alone(pipe: Any) -> None:
    sampler = HeadSpeculation(**FAST)
    together = pipe(["red heart", "blue cat"], sampler=sampler, num_images_per_prompt=2, output_type="tokens").tokens
    alone = pipe("blue cat", sampler=sampler, first_image=1, output_type="tokens").tokens
    assert torch.allclose(together[3], alone[0], atol=1e-4)
    assert not torch.allclose(together[3], together[2], atol=1e-2)
    assert not torch.allclose(
        pipe("blue cat", sampler=sampler, seed=1, output_type="tokens").tokens[0], together[2], atol=1e-2
    )


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in samplers_for("continuous")]
)
def test_images_have_seeds_of_their_own(pipe: Any, name: str) -> None:
    prompts, seeds = ["red heart", "blue cat", "red heart"], [3, 4, 5]
    together = pipe(prompts, sampler=fast(name), seed=seeds, output_type="tokens").tokens
    for row, prompt, seed in zip(together, prompts, seeds, strict=True):
        alone = pipe(prompt, sampler=fast(name), seed=seed, output_type="tokens").tokens[0]
        assert torch.allclose(row, alone, atol=1e-4)


def test_forced_tokens_stay_and_bend_the_rest(pipe: Any) -> None:
    forced = torch.full((GRID**2, 4), float("nan"))
    forced[[1, 7]] = torch.randn(2, 4)
    sampler = MaskedAutoregressive(**FAST)
    out = pipe(["red heart"] * 2, sampler=sampler, forced_tokens=forced, output_type="tokens")
    others: list[torch.Tensor] = []
    assert torch.equal(out.tokens[:, [1, 7]], forced[[1, 7]].expand(2, -1, -1))
    assert (out.commit_pass[:, [1, 7]] == -1).all() and int((out.commit_pass >= 0).sum()) == 14
    for large in (1e15, -1e15):  # of which the direction counts, as that of smaller ones
        forced[[1, 7]] = torch.tensor([large, 0.0, 0.0, 1e15])
        others.append(pipe("red heart", sampler=sampler, forced_tokens=forced, output_type="tokens").tokens[0, 0])
    assert not torch.equal(*others)
    for wrong in (forced[:4], torch.zeros_like(forced)):
        with pytest.raises(VisarError, match="forced_tokens"):
            pipe("red heart", sampler=sampler, forced_tokens=wrong)


def test_guidance_schedule_and_temperature_reach_the_law(pipe: Any) -> None:
    sampler = MaskedAutoregressive(**FAST)

    def tokens(**settings: Any) -> torch.Tensor:
        return pipe("red heart", sampler=sampler, output_type="tokens", **settings).tokens

    plain = tokens()
    assert torch.equal(plain, tokens(guidance_scale=2.0, guidance_schedule="linear", temperature=1.0))
    for other in (dict(guidance_schedule="constant"), dict(guidance_scale=1.0), dict(temperature=0.5)):
        assert not torch.equal(plain, tokens(**other))


def test_a_callback_sees_places_fill(pipe: Any) -> None:
    seen: list[Any] = []
    pipe("red heart", sampler=MaskedAutoregressive(**FAST), callback=seen.append)
    assert [p.passes for p in seen] == [1, 2, 3, 4]
    first, last = seen[0].preview(), seen[-1].preview()
    grey = (first == 128).all(-1)
    assert first.shape == (1, GRID, GRID, 3) and int(grey.sum()) == GRID**2 - int(seen[0].lengths)
    assert not (last == 128).all(-1).all()


def test_what_was_given_is_decided_from_the_first_pass(pipe: Any) -> None:
    seen: list[Any] = []
    forced = torch.full((GRID**2, pipe.mar.config.token_dim), float("nan"))
    forced[:3] = 0.5
    pipe("red heart", sampler=MaskedAutoregressive(**FAST), forced_tokens=forced, callback=seen.append)
    assert seen[0].known[0, :3].all() and (seen[0].commit_pass[0, :3] == -1).all()
    assert [int(p.known.sum()) for p in seen] == [int(p.lengths) for p in seen]
    assert not (seen[0].preview()[0].flatten(0, 1)[:3] == 128).all(-1).any()


def test_bfloat16_keeps_the_head_in_float32_and_float16_is_refused(pipe: Any) -> None:
    pipe.to(torch.bfloat16)
    assert pipe.mar.dtype == torch.bfloat16 and pipe.mar.diffloss.net.input_proj.weight.dtype == torch.float32
    assert pipe("red heart", sampler=HeadSpeculation(**FAST)).stats.settings["dtype"] == "bfloat16"
    with pytest.raises(VisarError, match="float16 is refused for a diffusion head"):
        pipe.to(torch.float16)


def test_files_may_be_of_half_precision(masked_folder: Path, words: WordEncoder, tmp_path: Path) -> None:
    TextToImagePipeline.from_pretrained(masked_folder).save_pretrained(tmp_path / "half", dtypes={"mar": torch.float16})
    again = TextToImagePipeline.from_pretrained(tmp_path / "half").to(torch.float32)
    assert again.mar.diffloss.net.input_proj.weight.dtype == torch.float32
    size = (tmp_path / "half" / "mar" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size < 0.6 * (masked_folder / "mar" / "diffusion_pytorch_model.safetensors").stat().st_size


def test_parts_may_be_those_of_an_embedded_model(tmp_path: Path) -> None:
    """Its words are then read there; what this model was trained on stays its own."""
    icons = TextToImagePipeline.from_pretrained("icons").text_encoder
    parts = {"mar": text_mar(buffer=12, caption_features=128), "vae": small_vae()}
    pipe = TextToImagePipeline(**parts, text_encoder=icons.knowing(Concepts(["3d"], {"": ["heart"]}, ["heart", "3d"])))
    pipe.save_pretrained(tmp_path / "a", parts_of={"text_encoder": "icons"})
    assert [f.name for f in (tmp_path / "a" / "text_encoder").iterdir()] == ["concepts.json"]
    again = TextToImagePipeline.from_pretrained(tmp_path / "a")
    assert len(again.text_encoder.words) > 20000 and again.text_encoder.concepts == concepts(tmp_path / "a")
    assert concepts(tmp_path / "a").styles == ["3d"] and concepts("icons").styles != ["3d"]
    (tmp_path / "a" / "text_encoder" / "concepts.json").unlink()
    assert TextToImagePipeline.from_pretrained(tmp_path / "a").text_encoder.concepts is None
    again.save_pretrained(tmp_path / "b")  # whole again
    assert (tmp_path / "b" / "text_encoder" / "config.json").exists()


def test_saving_takes_the_draft_model_along(masked_folder: Path, tmp_path: Path) -> None:
    TextToImagePipeline.from_pretrained(masked_folder).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "draft" / "config.json").exists()


def test_a_window_of_one_is_plain_decoding_bit_for_bit(pipe: Any) -> None:
    plain = pipe("red heart", sampler=MaskedAutoregressive(**FAST), output_type="tokens").tokens
    assert torch.equal(plain, pipe("red heart", sampler=HeadSpeculation(**FAST, draft=1), output_type="tokens").tokens)


def test_the_default_fits_what_is_left_to_draw(pipe: Any) -> None:
    forced = torch.randn(GRID**2, 4)
    forced[3] = float("nan")
    assert pipe("red heart", forced_tokens=forced, output_type="tokens").stats.nfe == 1


def test_bytes_are_counted(pipe: Any) -> None:
    """Of a width of 32 throughout: two blocks and what is around them in a pass, the head in a call."""
    norm, block = 2 * 32, (32 * 96 + 96) + (32 * 32 + 32) + (32 * 128 + 128) + (128 * 32 + 32) + 2 * 2 * 32
    cells, slots = GRID**2, 4
    positions = 32 * (2 * (cells + slots) + cells + 2)  # encoder, decoder and head, mask token and null caption
    body = 2 * block + positions + (4 * 32 + 32) + 3 * norm + (32 * 32 + 32)
    steps = (256 * 32 + 32) + (32 * 32 + 32)
    residual = norm + 2 * (32 * 32 + 32) + (32 * 96 + 96)
    call = (32 * 32 + 32) + (4 * 32 + 32) + residual + (32 * 64 + 64) + (32 * 8 + 8)
    stats = pipe("red heart", sampler=MaskedAutoregressive(**FAST), output_type="tokens").stats
    assert (stats.nfe, stats.denoiser_calls) == (4, 16)
    assert stats.gigabytes * 1e9 == pytest.approx(4 * (4 * body + steps + 16 * call), abs=0.5)


def test_a_sampler_of_your_own_is_of_its_family(pipe: Any) -> None:
    class Mine(HeadSpeculation):
        pass

    assert pipe("red heart", sampler=Mine(**FAST), output_type="tokens").stats.exact


def test_class_models_draw_classes() -> None:
    pipe = ClassToImagePipeline(mar=class_mar(), vae=small_vae())
    pipe.set_progress_bar_config(disable=True)
    out = pipe([1, 4], sampler=HeadSpeculation(**FAST))
    assert len(out.images) == 2 and out.stats.settings["guidance_scale"] == 2.9
    with pytest.raises(VisarError, match="this model knows 0 to 4"):
        pipe(5)


def test_the_command_line_knows_the_family(
    masked_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "a.png")
    model = ["--model", str(masked_folder)]
    quick = ["--set", "steps=4", "--set", "head_steps=6"]
    assert main(["generate", "red heart", *model, *quick, "--set", "adaptive=false", "--json", "-o", out]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sampler"] == "mar-headspec" and found["parameters"]["adaptive"] is False and found["denoiser_calls"]
    out = str(tmp_path / "b.png")
    assert main(["generate", "red heart", *model, "--sampler", "scd", "-o", out]) == 2
    assert "For continuous ones there are" in capsys.readouterr().err
    assert main(["generate", "red heart", *model, "--set", "adaptive=maybe", "-o", out]) == 2
    assert "must be true or false" in capsys.readouterr().err
    assert main(["generate", "red heart", *model, "--dtype", "float16", "-o", out]) == 2
    assert "float16 is refused" in capsys.readouterr().err and not (tmp_path / "b.png").exists()


def test_bench_shows_the_head(masked_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samplers = "mar,mar:steps=2,mar-headspec:draft=3,cspd"
    arguments = ["bench", "--model", str(masked_folder), "--samplers", samplers, "-n", "2", "--repeats", "1"]
    small = ["--set", "head_steps=6", "--set", "steps=4", "--json", str(tmp_path / "b.json")]
    assert main([*arguments, *small]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "DENOISER CALLS/PASS" in lines[0] and [line.split()[0] for line in lines[1:5]] == samplers.split(",")
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert (
        rows[0]["head"]["calls_per_pass"] == rows[0]["head"]["denoising_steps"] == 4
        and rows[1]["nfe"] == 2
        and rows[3]["head"]["acceptance"] is not None
    )
