"""A model whose weights were changed, however that was done, generates what a new pipeline with these weights does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from tests.helpers.recording import Recorder
from tests.helpers.tiny import VQ, class_gpt
from visar.engine.guidance import Guidance
from visar.engine.layers import Linear
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.vq import VQModel
from visar.generation.model import ImageModel
from visar.generation.sessions import Call, Sessions
from visar.pipelines import TextToImagePipeline
from visar.samplers import Target, get_sampler
from visar.text_encoders.words import WordEncoder

PROMPTS = ["red heart", "blue star"]


def noisy(x: Tensor, seed: int = 0) -> Tensor:
    return x + torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)


def ema(gpt: LlamaGen) -> None:
    other = copy.deepcopy(gpt)
    for p in other.parameters():
        p.data.mul_(-1.5)
    EMAModel(other.parameters()).copy_to(gpt.parameters())


def lora(gpt: LlamaGen) -> None:
    """Merged as PEFT and diffusers do it."""
    for name, w in gpt.named_parameters():
        if "wqkv" not in name:
            continue
        w.data += noisy(torch.zeros(w.shape[0], 2)) @ noisy(torch.zeros(2, w.shape[1]))


def swapped(gpt: LlamaGen) -> None:
    for p in gpt.parameters():
        p.data = noisy(p.data)


def numpy(gpt: LlamaGen) -> None:
    gpt.output.weight.detach().numpy()[:] *= -1


def element(gpt: LlamaGen) -> None:
    gpt.output.weight.detach().numpy()[3, 5] = 40.0


def normed(gpt: LlamaGen) -> None:
    nn.utils.parametrizations.weight_norm(gpt.output)
    gpt.output.parametrizations.weight.original0.data.mul_(3)  # type: ignore[union-attr, operator]
    nn.utils.parametrize.remove_parametrizations(gpt.output, "weight")


CHANGES: dict[str, Callable[[LlamaGen], Any]] = {
    "data.copy_": lambda gpt: [p.data.copy_(noisy(p.data)) for p in gpt.parameters()],
    "EMAModel.copy_to": ema,
    "numpy": numpy,
    "one element": element,
    "LoRA": lora,
    "another tensor": swapped,
    "load_state_dict": lambda gpt: gpt.load_state_dict(initial(gpt).state_dict()),
    "assign": lambda gpt: gpt.load_state_dict(initial(gpt).state_dict(), assign=True),
    "vector_to_parameters": lambda gpt: nn.utils.vector_to_parameters(
        noisy(nn.utils.parameters_to_vector(gpt.parameters()).detach()), gpt.parameters()
    ),
    "weight_norm": normed,
    "half and back": lambda gpt: gpt.half().float(),
    "rows exchanged": lambda gpt: gpt.output.weight.data.copy_(gpt.output.weight.data.flip(0)),
    "one layer": lambda gpt: setattr(gpt.layers[1].feed_forward, "w2", Linear(48, 32, bias=False)),
}
DEFAULT = ("data.copy_", "EMAModel.copy_to", "numpy", "one element")  # all others are slow tests


def initial(gpt: LlamaGen) -> LlamaGen:
    torch.manual_seed(7)
    return type(gpt)(**gpt.config)


@pytest.mark.parametrize("change", [c if c in DEFAULT else pytest.param(c, marks=pytest.mark.slow) for c in CHANGES])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_tokens_are_those_of_a_new_pipeline(change: str, dtype: torch.dtype, text_pipe: TextToImagePipeline) -> None:
    if dtype != torch.float32 and change in ("numpy", "one element", "half and back", "one layer"):
        pytest.skip("NumPy has no bfloat16")
    text_pipe.to(dtype)
    model = text_pipe.image_model

    def tokens(of: ImageModel) -> Tensor:
        return of.generate(PROMPTS, sampler="scd", seed=1, output_type="tokens").tokens

    with torch.no_grad():
        before = tokens(model)
        CHANGES[change](text_pipe.gpt)
        after = tokens(model)
        family = model.family
        new = ImageModel(type(family).of(copy.deepcopy(family.components), family.settings))
        assert torch.equal(after, tokens(new))
    if change != "half and back":
        assert not torch.equal(before, after)


@pytest.mark.parametrize("part", ["weight", "scale"])
def test_eight_bits(part: str, text_pipe: TextToImagePipeline) -> None:
    text_pipe.quantize("int8")
    model = text_pipe.image_model
    before = model.generate(PROMPTS, seed=1, output_type="tokens").tokens
    for block in text_pipe.gpt.layers:
        getattr(block.attention.wo, part).detach().numpy()[3:] *= -1
        getattr(block.feed_forward.w2, part).detach().numpy()[:20] *= -1
    after = model.generate(PROMPTS, seed=1, output_type="tokens").tokens
    family = model.family
    new = ImageModel(type(family).of(copy.deepcopy(family.components), family.settings))
    assert torch.equal(after, new.generate(PROMPTS, seed=1, output_type="tokens").tokens)
    assert not torch.equal(before, after)


def test_a_changed_drafter_drafts(text_pipe: TextToImagePipeline, drafters: list[Path]) -> None:
    """Tokens of an exact sampler that depends on its drafter's distribution."""
    model = text_pipe.image_model
    model.load_drafter(drafters[-1])
    one = model.generate(PROMPTS, sampler="speculative", seed=1, output_type="tokens")
    for p in model.drafters.loaded["model"].parameters():
        p.data.copy_(noisy(p.data))
    two = model.generate(PROMPTS, sampler="speculative", seed=1, output_type="tokens")
    model.drafters.loaded["model"] = copy.deepcopy(model.drafters.loaded["model"])
    three = model.generate(PROMPTS, sampler="speculative", seed=1, output_type="tokens")
    assert torch.equal(two.tokens, three.tokens) and torch.equal(two.commit_pass, three.commit_pass)
    assert not torch.equal(one.commit_pass, two.commit_pass)


@pytest.mark.parametrize("part", ["codebook", "decoder", "another tokenizer"])
def test_the_preview_is_of_the_present_tokenizer(part: str, text_pipe: TextToImagePipeline) -> None:
    family = text_pipe.image_model.family
    ids = torch.arange(24).repeat(2)[: family.layout.length][None]
    before = family.preview(ids)
    if part == "codebook":
        text_pipe.vq.quantize.embedding.weight.data.copy_(text_pipe.vq.quantize.embedding.weight.data.flip(0))
    elif part == "decoder":
        text_pipe.vq.decoder.conv_out.bias.detach().numpy()[0] += 0.5
    else:
        text_pipe.vq = VQModel(**VQ).eval()
    after = family.preview(ids)
    new = type(family).of(copy.deepcopy(family.components), family.settings)
    assert torch.equal(after, new.preview(ids)) and not torch.equal(before, after)


def test_nearest_words_are_of_the_present_table() -> None:
    from visar.text_encoders.concepts import Concepts

    words = ["cat", "dog", "city"]
    vectors = torch.eye(3)
    table = (vectors * 127).to(torch.int8)
    encoder = WordEncoder([*words, "kitten"], torch.cat([table, table[:1]]), torch.ones(4))
    known = Concepts([], {"things": words}, words)
    assert known.nearest("kitten", encoder) == "cat"
    encoder.table.numpy()[:3] = table.flip(0).numpy()
    assert known.nearest("kitten", encoder) == "city"


@pytest.mark.parametrize("change", [pytest.param(c, marks=pytest.mark.slow) for c in ("data.copy_", "another tensor")])
def test_kept_graphs(change: str, text_pipe: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured step reads the weights where they were, so it is used only while they are there."""
    model, record = text_pipe.image_model, Recorder(monkeypatch)
    call: dict[str, Any] = dict(sampler="scd", seed=1, output_type="tokens")
    model.sessions = Sessions(record)
    model.generate(PROMPTS, **call)
    with torch.no_grad():
        CHANGES[change](text_pipe.gpt)
    after = model.generate(PROMPTS, **call).tokens
    model.sessions = Sessions(record)
    assert torch.equal(after, model.generate(PROMPTS, **call).tokens)


def test_a_kept_session_has_the_present_codebook(text_pipe: TextToImagePipeline) -> None:
    model, seen = text_pipe.image_model, []
    sessions = Sessions(lambda step: step)

    def run() -> None:
        encoded = model.family.encode(PROMPTS)
        call = Call(model.family, None, encoded, get_sampler("ar"), Target(), Guidance())  # type: ignore[arg-type]
        sessions.run(call, lambda session, graph: seen.append(session))

    run()
    text_pipe.vq = VQModel(**VQ).eval()
    run()
    assert seen[0] is seen[1] and torch.equal(seen[1].codebook, text_pipe.vq.quantize.codes)


def test_a_class_model_too() -> None:
    torch.manual_seed(0)
    from visar.families.llamagen.family import LlamaGenFamily

    model = ImageModel(LlamaGenFamily(class_gpt(), VQModel(**VQ).eval(), top_k=0))
    before = model.generate([1, 2], seed=1, output_type="tokens").tokens
    ema(model.family.gpt)  # type: ignore[attr-defined]
    assert not torch.equal(before, model.generate([1, 2], seed=1, output_type="tokens").tokens)
