"""Janus against the stock `generate`, decoder and processor of transformers, on a tiny one of random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import visar
from tests.helpers.hf_folders import Damage, check_commands, check_damaged, check_verified, edited
from tests.helpers.recording import Recorder
from tests.helpers.tiny_hf import PROMPTS, janus, janus_processor, stock_janus, tiny_janus
from visar.errors import VisarError
from visar.generation.model import ImageModel
from visar.generation.pool import Pool, Request
from visar.params import SamplingParams

GREEDY = SamplingParams(top_k=1)


@pytest.fixture
def pipe() -> Any:
    made = visar.accelerate(*janus())
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("families") / "janus"
    for part in janus():
        part.save_pretrained(path)
    return path


@pytest.mark.parametrize("sampler", ["ar", "scd"])
def test_greedy_tokens_are_those_of_generate(pipe: Any, sampler: str) -> None:
    model, processor = janus()
    stock = stock_janus(model, processor, PROMPTS)
    assert len(stock.unique(dim=0)) == len(PROMPTS) and len(stock.unique()) > 15
    assert torch.equal(pipe(list(PROMPTS), sampler=sampler, top_k=1, output_type="tokens").tokens, stock)
    for i, text in enumerate(PROMPTS):
        assert torch.equal(pipe(text, sampler=sampler, top_k=1, output_type="tokens").tokens, stock[i : i + 1])
    weak = stock_janus(model, processor, PROMPTS, 1.5)
    assert not torch.equal(weak, stock)
    out = pipe(list(PROMPTS), sampler=sampler, top_k=1, guidance_scale=1.5, output_type="tokens")
    assert torch.equal(out.tokens, weak)


@pytest.mark.parametrize("way", ["calls", "rows", "rows, captured"])
def test_what_changes_between_images_is_in_the_next(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks, of which one may get the memory of another, and adapters; what was captured for one is not run for it."""
    model, processor = tiny_janus(), janus_processor()
    pipe = visar.accelerate(model, processor)
    if way != "rows":
        record = pipe.image_model.sessions.capture = Recorder(monkeypatch)
    pool, layer = Pool(ImageModel.of(pipe), "scd", size=2), model.model.language_model.layers[0]

    def check() -> None:
        stock = stock_janus(model, processor, PROMPTS[:2])
        if way == "calls":
            found = pipe(list(PROMPTS[:2]), sampler="scd", top_k=1, output_type="tokens").tokens
        else:
            done = {r.request.tag: r.tokens for r in pool.run(Request(PROMPTS[i], GREEDY, tag=i) for i in range(2))}
            found = torch.stack([done[0], done[1]])
        assert torch.equal(found, stock)
        seen.append(stock)

    seen: list[Tensor] = []
    check()
    for scale in (-3.0, 2.0):
        handle = layer.mlp.register_forward_hook(lambda _, __, y, scale=scale: scale * y)
        check()
        handle.remove()
        del handle
    layer.mlp.down_proj = Adapter(layer.mlp.down_proj)
    check()
    layer.mlp.down_proj.active_adapters = ()
    check()
    assert len(torch.stack(seen).unique(dim=0)) == 4 and torch.equal(seen[0], seen[-1])
    if way == "calls":
        assert record.captures == 5
        check()
        assert record.captures == 5


def test_pixels_are_those_of_the_stock_decoder(pipe: Any) -> None:
    model, processor = janus()
    out = pipe(list(PROMPTS), seed=3, output_type="pt")
    with torch.no_grad():
        # [B, H, W, 3] in [-1, 1]; one by one, as visar does, since convolutions round otherwise in a batch.
        stock = torch.cat([model.decode_image_tokens(one) for one in out.tokens.split(1)])
    assert out.images.shape == (3, 3, 64, 64)
    assert torch.equal(out.images, (stock / 2 + 0.5).clamp(0, 1).permute(0, 3, 1, 2))
    image = pipe(PROMPTS[0], seed=3).images[0]
    theirs = processor.postprocess(list(stock[:1]), return_tensors="pt")["pixel_values"][0]
    ours = (
        torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if theirs.shape[0] == 3
        else torch.from_numpy(np.array(image))
    )
    assert (ours.int() - theirs.int()).abs().max() <= 1  # theirs are cut to whole numbers, and not rounded


def test_codes_are_compared_as_the_tokenizer_does(pipe: Any) -> None:
    quantize = janus()[0].model.vqmodel.quantize
    with torch.no_grad():
        entries = quantize.get_codebook_entry(torch.arange(16)[None]).flatten(2)[0].T
    codebook = pipe.image_model.family.codebook
    torch.testing.assert_close(codebook[:16], entries, rtol=0, atol=1e-7)


def test_a_model_is_left_as_it_was(pipe: Any) -> None:
    model, processor = janus()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    stock = stock_janus(model, processor, PROMPTS[:1])
    with pytest.raises(RuntimeError, match="stop"):
        pipe(PROMPTS[0], callback=lambda now: (_ for _ in ()).throw(RuntimeError("stop")))
    assert names == [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(stock_janus(model, processor, PROMPTS[:1]), stock)


class Adapter(nn.Module):
    """A low-rank adapter as PEFT's, with the names by which its layers are known."""

    active_adapters = ("default",)

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer, seed = base, torch.Generator().manual_seed(1)
        self.a = nn.Parameter(torch.randn(2, base.in_features, generator=seed))
        self.b = nn.Parameter(torch.randn(base.out_features, 2, generator=seed) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + (x @ self.a.T @ self.b.T if self.active_adapters else 0)


def test_adapters_in_layers_are_in_the_images() -> None:
    model, processor = tiny_janus(), janus_processor()
    without = stock_janus(model, processor, PROMPTS)
    pool = Pool(ImageModel.of(visar.accelerate(model, processor)), "scd", size=1)
    pooled = [Request(PROMPTS[0], SamplingParams(top_k=1))]
    assert [torch.equal(done.tokens, without[0]) for done in pool.run(pooled)] == [True]
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj, layer.mlp.up_proj = Adapter(layer.self_attn.q_proj), Adapter(layer.mlp.up_proj)
    stock = stock_janus(model, processor, PROMPTS)
    out = visar.accelerate(model, processor)(list(PROMPTS), top_k=1, sampler="scd", output_type="tokens")
    assert torch.equal(out.tokens, stock) and not torch.equal(stock[0], without[0])
    assert [torch.equal(done.tokens, stock[0]) for done in pool.run(pooled)] == [True]


def test_rows_that_are_taken_in_turns(pipe: Any) -> None:
    """Prompts of unlike lengths, one of them longer than all before it."""
    long = " ".join(["wide"] * 80)
    settings = [SamplingParams(seed=2), SamplingParams(guidance_scale=1.0), SamplingParams(temperature=0.7, top_k=9)]
    requests = [Request(text, settings[i % 3], tag=i) for i, text in enumerate([*PROMPTS, long, PROMPTS[0]])]
    model = ImageModel.of(pipe)
    found = {done.request.tag: done for done in Pool(model, "scd", size=2).run(requests)}
    for request in requests:
        out = model.generate(request.condition, request.params, sampler="scd", output_type="tokens")
        done = found[request.tag]
        assert torch.equal(done.tokens, out.tokens[0]) and done.nfe == out.stats.nfe, request.condition


def test_defaults_are_those_of_the_generation_config() -> None:
    """Whenever it says them; a caller's own go before."""
    model = tiny_janus()
    pipe = visar.accelerate(model, janus_processor())
    stock = stock_janus(model, janus_processor(), PROMPTS[:1], 2.0)
    model.generation_config.update(do_sample=True, top_k=1, guidance_scale=2.0, repetition_penalty=1.0)
    assert torch.equal(pipe(PROMPTS[0], output_type="tokens").tokens, stock)
    assert pipe(PROMPTS[0], guidance_scale=3.0, output_type="tokens").stats.settings["guidance_scale"] == 3
    for name, value in (("repetition_penalty", 1.2), ("min_p", 0.1), ("num_return_sequences", 2)):
        model.generation_config.update(**{name: value})
        with pytest.raises(VisarError, match=f"generation_config has {name}={value}, which visar does not do"):
            pipe(PROMPTS[0])
        model.generation_config.update(**{name: None})


@pytest.mark.parametrize("invariant", [False, True])
def test_the_same_image_in_every_batch(pipe: Any, invariant: bool) -> None:
    settings: dict[str, Any] = dict(sampler="sjd", seed=4, output_type="tokens", invariant=invariant)
    texts = [PROMPTS[0], " ".join(["wide"] * 80)]  # of which the second needs more room
    whole = pipe(texts, **settings).tokens
    assert all(torch.equal(pipe(text, **settings).tokens[0], whole[i]) for i, text in enumerate(texts))


def test_the_command_line_works_by_registration(folder: Path, tmp_path: Path) -> None:
    check_commands(folder, tmp_path, (64, 64))
    assert torch.equal(
        visar.load(folder)("cat", top_k=1, sampler="ar", output_type="tokens").tokens,
        stock_janus(*janus(), PROMPTS[2:]),
    )


@pytest.mark.slow
def test_verify_on_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_verified(folder, capsys, "ar,sjd,scd,scd-gumbel")


def without(path: Path, part: str) -> None:
    state = load_file(path / "model.safetensors")
    save_file({k: v for k, v in state.items() if part not in k}, path / "model.safetensors", {"format": "pt"})


def cut(path: Path) -> None:
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def code(path: Path) -> None:
    (path / "own.py").write_text("raise SystemExit('run')")
    edited("tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.Own"]})(path)


def language(**changes: Any) -> Callable[[Path], Any]:
    """Other values in the configuration of the language model."""

    def edit(path: Path) -> None:
        found = json.loads((path / "config.json").read_text())["text_config"]
        edited("config.json", text_config=found | changes)(path)

    return edit


DAMAGE: Damage = {
    "no image tokenizer": (lambda f: without(f, "vqmodel"), r"Tensor 'model\.vqmodel\..* is missing or misshapen, and"),
    "a file that is cut": (cut, "Could not load the JanusForConditionalGeneration from"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "other shapes": (language(intermediate_size=47), "is missing or misshapen, and 5 others"),
    "fewer layers": (language(num_hidden_layers=1), r"layers\.1\..* is of a layer that the mo"),
    "no layers": (language(num_hidden_layers=0), "is no causal decoder of transformers"),
    "a larger model by its configuration": (
        language(vocab_size=2**36),
        r"needs \d+\.\d GiB of memory, and .* are free",
    ),
    "another position": (language(rope_parameters={"rope_type": "spiral"}), "'spiral' is not known"),
    "heads that do not fit": (language(num_attention_heads=3), "'validate_architecture': .*attention heads"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "Could not load the processor of prompts"),
    "code of its own": (code, r"tokenizer of its own code \(.*own.Own.*\), which visar does not run"),
    "a language model": (edited("config.json", model_type="qwen3"), "'qwen3', which no family of visar loads"),
    "DeepSeek's layout by name": (edited("config.json", model_type="multi_modality"), "has no language_config"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders(damage: str, folder: Path, tmp_path: Path) -> None:
    check_damaged(folder, tmp_path, *DAMAGE[damage])


@pytest.mark.parametrize("part", ["model.language_model.embed_tokens", "model.generation_head", "model.language_model"])
def test_a_model_of_two_dtypes_is_refused(part: str) -> None:
    """Products of both would fail; parts that make pixels may have another."""
    model = tiny_janus().to(torch.bfloat16)
    model.model.vqmodel.float()
    pipe = visar.accelerate(model, janus_processor())
    assert pipe("cat").images[0].size == (64, 64)
    model.get_submodule(part).float()
    with pytest.raises(
        VisarError, match=r"weights in bfloat16 and float32; convert all of it to one with .to\(dtype\)"
    ):
        pipe("cat")
    model.to(torch.float8_e4m3fn)
    with pytest.raises(VisarError, match=r"dtype of the model must be .* not torch.float8_e4m3fn"):
        pipe("cat")


@pytest.mark.parametrize("place", ["model", "adapter"])
def test_a_model_that_drops_features_is_refused(place: str) -> None:
    """An adapter that comes after `eval` is in training mode."""
    model = tiny_janus()
    pipe = visar.accelerate(model, janus_processor())
    attention = model.model.language_model.layers[0].self_attn
    if place == "model":
        model.train()
    else:
        attention.q_proj = nn.Sequential(nn.Dropout(0.5), attention.q_proj)
    with pytest.raises(VisarError, match=r"in training mode.*call its eval\(\)"):
        pipe("cat")
    model.eval()
    pipe("cat", output_type="tokens")


def test_what_is_refused(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model, processor = janus()
    room = 512 - 16
    with pytest.raises(VisarError, match=rf"The prompt has \d+ tokens; this model takes at most {room} next to the 16"):
        pipe(" ".join(["wide"] * 600))
    with pytest.raises(VisarError, match="knows no images of a Qwen3ForCausalLM"):
        visar.accelerate(Qwen3ForCausalLM(Qwen3Config(vocab_size=9, hidden_size=8, num_hidden_layers=1)))
    with pytest.raises(VisarError, match="Give the processor of this JanusForConditionalGeneration"):
        visar.accelerate(model)
    for other in (5, "reader", model, lambda text: [1]):
        with pytest.raises(VisarError, match=f"A processor or a tokenizer reads prompts, not a {type(other).__name__}"):
            visar.accelerate(model, other)
    with pytest.raises(VisarError, match="needs a drafter"):
        pipe("cat", sampler="eagle")
    with pytest.raises(VisarError, match="saved by its own save_pretrained"):
        pipe.save_pretrained("nowhere")
    with pytest.raises(
        VisarError, match=r"gives the prompt ids up to \d+, and this model knows those below 9: it is ano"
    ):
        visar.accelerate(tiny_janus(vocab_size=9), processor)("cat")
    for found in ("4.57.6", "5.25.0", "6.0.0.dev0", None):
        monkeypatch.setattr("visar.families.hf.versions.installed", lambda found=found: found)
        with pytest.raises(VisarError, match=r"from version 5\.0 to below 5\.25"):
            visar.accelerate(model, processor)
