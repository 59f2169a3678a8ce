"""Layers of transformers that visar runs itself: against the own `forward`, with what people add to layers, in 8 bits.

All worlds of `test_sessions.py` but one are decoded by them.
"""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import visar
from tests.families.hf.test_sessions import farthest
from tests.families.hf.worlds import WORLDS, World, causal
from tests.helpers.tiny_hf import janus
from visar.engine import layers
from visar.engine.quantization import QuantizedLinear, quantize, rounded
from visar.errors import VisarError
from visar.families.hf.session import TransformersSession
from visar.families.hf.stack import Norms, Stack
from visar.kernels.derived import steady_weights
from visar.kernels.invariant import invariant

TOKENS = torch.tensor([[0, 3, 1, 2]])
KNOWN = [kind for kind in WORLDS if kind != "mistral"]


def logits(world: World, own_forward: bool = False) -> Tensor:
    def made(*condition: Any, **more: Any) -> TransformersSession:
        return TransformersSession(*condition, own_forward=own_forward, **more)

    with torch.inference_mode():
        return world.session([0, 1], 4, made=made).forward(TOKENS.expand(2, -1) % world.decoder.vocab)


@pytest.mark.parametrize("kind", KNOWN)
def test_layers_have_the_logits_of_the_own_forward(kind: str) -> None:
    world = WORLDS[kind]()
    assert Stack.of(world.decoder.backbone) is not None
    torch.testing.assert_close(logits(world), logits(world, own_forward=True), atol=2e-5, rtol=1e-5)
    world.model.to(torch.bfloat16)
    try:
        ours, theirs, exact = logits(world), logits(world, own_forward=True), world.model.float() and logits(world)
    finally:
        world.model.float()
    scale = exact.abs().max()
    assert (ours - exact).abs().max() < 0.05 * scale and (theirs - exact).abs().max() < 0.05 * scale


class AdjacentPairs(Stack):
    """Known bad: rotates as LlamaGen does."""

    def rotary(self, position_ids: Tensor) -> tuple[Tensor, int]:
        return super().rotary(position_ids)[0], 0


class NoNorm(Stack):
    """Known bad: attention of what is not normed."""

    def __init__(self, backbone: Any, norms: Norms):
        super().__init__(backbone, replace(norms, before_attention=None))


@pytest.mark.parametrize("bad", [AdjacentPairs, NoNorm])
def test_known_bad_layers_are_caught(bad: type[Stack], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visar.families.hf.session.Stack", bad)
    assert farthest(WORLDS["qwen3"]()) > 0.05


@pytest.mark.parametrize("place", ["", "layers.1", "layers.0.self_attn", "layers.1.mlp", "layers.1.mlp.act_fn"])
def test_a_hook_on_what_is_not_called_brings_back_the_own_forward(place: str) -> None:
    world = causal("Qwen3", head_dim=12)
    part, calls = world.decoder.backbone.get_submodule(place), []
    plain = logits(world)
    handle = part.register_forward_hook(lambda *_: calls.append(place))
    assert Stack.of(world.decoder.backbone) is None
    torch.testing.assert_close(logits(world), plain, atol=2e-5, rtol=1e-5)
    assert calls
    handle.remove()
    assert Stack.of(world.decoder.backbone) is not None


@torch.inference_mode()
def test_a_hook_that_comes_between_two_images_runs() -> None:
    """In a session that is kept."""
    world = causal("Qwen3", head_dim=12)
    session = world.session([0], 4)
    plain = session.forward(TOKENS)
    handle = world.decoder.backbone.layers[0].register_forward_hook(lambda _, __, y: 2 * y)
    session.start(*world.condition([0]))
    assert (session.forward(TOKENS) - plain).abs().max() > 0.1
    handle.remove()
    session.start(*world.condition([0]))
    assert torch.equal(session.forward(TOKENS), plain)


@torch.inference_mode()
def test_a_session_that_is_kept_holds_no_weights_that_were_replaced() -> None:
    world = causal("Qwen3", head_dim=12)
    session, mlp = world.session([0], 4), world.decoder.backbone.layers[0].mlp
    with steady_weights():
        session.forward(TOKENS)
    gone = weakref.ref(mlp.down_proj.weight)
    mlp.down_proj = copy.deepcopy(mlp.down_proj)
    gc.collect()
    assert gone() is None
    with steady_weights():
        session.forward(TOKENS)


def test_the_invariant_mode_joins_no_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows would depend on how many there are."""
    called: list[str] = []
    joined = layers.joined
    monkeypatch.setattr(layers, "joined", lambda *given, **more: called.append("joined") or joined(*given, **more))
    world = causal("Qwen3", head_dim=12)
    with invariant():
        logits(world)
    assert not called
    logits(world)
    assert called


class Adapter(nn.Module):
    """As those of PEFT: a layer around a linear one."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer, self.more = base, nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.more(x)


@torch.inference_mode()
def test_adapters_and_hooks_of_linear_layers_and_norms_run() -> None:
    world = causal("Qwen3", head_dim=12)
    plain, layer = logits(world), world.decoder.backbone.layers[1]
    layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
    layer.mlp.up_proj.register_forward_hook(lambda _, __, y: 1.5 * y)
    layer.input_layernorm.register_forward_hook(lambda _, __, y: 0.5 * y)
    norm = layer.post_attention_layernorm
    norm.__class__ = type("Own", (type(norm),), {"forward": lambda self, x: -x, "__module__": __name__})
    assert Stack.of(world.decoder.backbone) is not None
    changed = logits(world)
    assert (changed - plain).abs().max() > 0.1
    torch.testing.assert_close(changed, logits(world, own_forward=True), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("change", ["activation", "scaling", "class", "layers"])
def test_what_is_not_known_runs_by_the_own_forward(change: str) -> None:
    world = causal("Llama", **({"hidden_act": "gelu"} if change == "activation" else {}))
    layer: Any = world.decoder.backbone.layers[1]
    if change == "scaling":
        layer.self_attn.scaling = 0.1
    if change == "layers":  # of which transformers leaves out the last
        world.decoder.config.num_hidden_layers = 1
    if change == "class":
        layer.mlp.__class__ = type("LlamaMLP", (type(layer.mlp),), {"forward": lambda _, x: 0 * x})
    assert Stack.of(world.decoder.backbone) is None
    torch.testing.assert_close(logits(world), logits(world, own_forward=True))


@pytest.mark.parametrize("name", ["self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"])
def test_a_hook_on_a_rounded_layer_gets_the_product_alone(name: str) -> None:
    world = causal("Qwen3")
    quantize(world.decoder.backbone, "int8")
    plain = logits(world)
    world.decoder.backbone.layers[1].get_submodule(name).register_forward_hook(lambda _, __, y: -2 * y)
    assert (logits(world) - plain).abs().max() > 0.1
    torch.testing.assert_close(logits(world), logits(world, own_forward=True), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3"])
@torch.inference_mode()
def test_rounded_layers(kind: str) -> None:
    """Qwen2 has biases. The written-out model is the reference."""
    world, written = causal(kind), causal(kind)
    for layer in written.decoder.backbone.layers.modules():
        if isinstance(layer, nn.Linear):
            stored, scale = rounded(layer.weight, "int8")
            layer.weight.copy_(stored.float() * scale[:, None])
    native = logits(world)
    quantize(world.decoder.backbone, "int8")
    wanted, found = logits(written), logits(world)
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=1e-3)
    assert (found - wanted).abs().max() < (native - wanted).abs().max() / 3
    torch.testing.assert_close(logits(world, own_forward=True), found, atol=2e-3, rtol=1e-3)


def test_a_rounded_model_of_a_family(tmp_path: Path) -> None:
    model, processor = janus()
    model = copy.deepcopy(model)
    pipe: Any = visar.accelerate(model, processor)
    family = pipe.image_model.family
    before = family.bytes_per_pass
    pipe.quantize("int8")
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 7 * len(family.decoder.backbone.layers)
    assert family.bytes_per_pass < before / 2
    out = pipe("cat", output_type="tokens")
    assert out.stats.settings["weights"] == "int8"
    for action in (lambda: model.save_pretrained(tmp_path / "x"), lambda: pipe.quantize("native")):
        with pytest.raises(VisarError, match=r"is not saved|are int8 already"):
            action()
    assert not (tmp_path / "x").exists()
