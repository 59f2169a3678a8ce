"""Which models are decoders, what of their vocabulary runs, and that no pass goes by another cache or attention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.families.hf.worlds import CODES, WORLDS, World, causal
from tests.helpers.tiny_chameleon import tiny_chameleon
from visar.engine.guidance import Guidance
from visar.engine.loop import decode
from visar.engine.rng import Noise
from visar.errors import VisarError
from visar.families.hf.attention import at_work, configurations
from visar.families.hf.decoder import ImageDecoder, VocabularyDecoder
from visar.samplers import Target, get_sampler

TOKENS = torch.tensor([[0, 3, 1, 2]])


def logits(world: World) -> Tensor:
    with torch.inference_mode():
        return world.session([0], 4, 4).forward(TOKENS)


@pytest.mark.parametrize("codes", [CODES, (12, 13, 14, 15)], ids=["copy", "view"])
@torch.inference_mode()
def test_the_rows_of_the_codes_follow_the_weights(codes: tuple[int, ...]) -> None:
    """Also in a session that is started again, whose graph would read them where they were."""
    model = causal("Qwen3", head_dim=12).model
    world = World(model, VocabularyDecoder(model, codes))
    session = world.session([0], 4, 4)
    before = session.forward(TOKENS)
    place = world.decoder._weight.data_ptr()  # type: ignore[attr-defined]
    model.lm_head.weight.mul_(2)
    session.start(*world.condition([0]))
    torch.testing.assert_close(session.forward(TOKENS), 2 * before)
    assert world.decoder._weight.data_ptr() == place  # type: ignore[attr-defined]


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return -2 * self.inner(x)


class Derived(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return -2 * super().forward(x)


def other_head(model: Any, kind: str) -> None:
    """One whose logits are -2 times those before."""
    head: Any = model.lm_head
    if kind == "hook":
        head.register_forward_hook(lambda _, __, y: -2 * y)
    elif kind == "forward":
        head.forward = lambda x: -2 * nn.functional.linear(x, head.weight)
    elif kind == "wrapper":
        model.lm_head = Wrapped(head)
    else:
        model.lm_head = (Derived if kind == "class" else nn.Linear)(head.in_features, head.out_features, bias=False)
        model.lm_head.weight = head.weight if kind == "class" else nn.Parameter(-2 * head.weight.detach())


@pytest.mark.parametrize("kind", ["hook", "forward", "wrapper", "class", "another"])
def test_the_head_is_that_which_the_model_has_now(kind: str) -> None:
    world = causal("Qwen3", head_dim=12)
    expected = -2 * logits(world)
    other_head(world.model, kind)
    torch.testing.assert_close(logits(world), expected)
    torch.testing.assert_close(logits(World(world.model, VocabularyDecoder(world.model, CODES))), expected)


def test_a_drafter_needs_a_head_with_a_weight() -> None:
    world = causal("Qwen3", head_dim=12)
    world.model.lm_head = Wrapped(world.model.lm_head)
    with pytest.raises(VisarError, match="by the weight of the head, and this Wrapped has none"):
        _ = world.decoder.head_weight
    world.model.lm_head = None
    with pytest.raises(VisarError, match="Qwen3ForCausalLM has no output head"):
        logits(world)


@pytest.mark.parametrize("kind", ["janus", "qwen3"])
def test_the_backbone_is_that_which_the_model_has_now(kind: str) -> None:
    world = copy.deepcopy(WORLDS[kind]())
    before = logits(world)
    whole: Any = world.model.model if kind == "janus" else world.model
    name = "language_model" if kind == "janus" else "model"
    other = copy.deepcopy(getattr(whole, name))
    with torch.no_grad():
        other.layers[0].mlp.down_proj.weight.mul_(-2)
        other.embed_tokens.weight.mul_(-1)
    setattr(whole, name, other)
    found = logits(world)
    assert (found - before).abs().max() > 0.1
    torch.testing.assert_close(found, world.guided(0, TOKENS[:, 1:]), atol=2e-5, rtol=1e-5)


def test_a_model_that_lost_its_codes_is_refused() -> None:
    world = causal("Qwen3", head_dim=12)
    world.model.resize_token_embeddings(12, mean_resizing=False)
    with pytest.raises(VisarError, match="go from 3 to 17; the vocabulary has 12 ids"):
        logits(world)


ROPE = dict(rope_theta=1e4, factor=2.0)
LONG = dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[9.0] * 4)


@pytest.mark.parametrize(
    ("sizes", "room"),
    [
        (dict(rope_type="linear"), None),
        (dict(rope_type="yarn", original_max_position_embeddings=16), None),
        (dict(rope_type="dynamic"), 24),
        (LONG | dict(original_max_position_embeddings=9), 9),
        (LONG | dict(original_max_position_embeddings=22), 22),
    ],
)  # fmt: skip
def test_scaled_positions(sizes: dict[str, Any], room: int | None) -> None:
    """Prompt, image and window are 15 or 25 slots. What is decoded must not hang on the width of a pass."""
    world = causal("Llama", rope_parameters=ROPE | sizes, max_position_embeddings=24)
    stock = world.guided(0, TOKENS[:, 1:])
    for length in (4, 14):
        with torch.inference_mode():
            if room is None or 8 + length + 3 <= room:
                found = world.session([0], 4, length).forward(TOKENS)
                torch.testing.assert_close(found, stock, atol=2e-5, rtol=1e-5)
            else:
                with pytest.raises(VisarError, match=f"are others beyond {room} tokens .its rope_type."):
                    world.session([0], 4, length)


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        ("Gemma2", dict(head_dim=8, final_logit_softcapping=None), "its attention caps its logits"),
        ("Gemma2", dict(head_dim=8), r"it changes its logits \(final_logit_softcapping\)"),
        ("Qwen2", dict(use_sliding_window=True, sliding_window=4, max_window_layers=0), "sees the last 4 tokens only"),
    ],
)
def test_attention_that_is_not_visars_is_refused(kind: str, sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(VisarError, match=message):
        logits(causal(kind, **sizes))


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", pytest.param("Gemma", marks=pytest.mark.slow)])
def test_stock_models_have_the_logits_of_a_stock_pass(kind: str) -> None:
    world = causal(kind, **({"head_dim": 8} if kind == "Gemma" else {}))
    torch.testing.assert_close(logits(world), world.guided(0, TOKENS[:, 1:]), atol=2e-5, rtol=1e-5)


def test_codes_that_a_vocabulary_does_not_have() -> None:
    model = WORLDS["qwen3"]().model
    for codes, message in (
        (range(20, 30), "go from 20 to 29; the vocabulary has 24 ids"),
        ([3, 3, 4], "each given once"),
        ([], "each given once"),
    ):
        with pytest.raises(VisarError, match=message):
            VocabularyDecoder(model, codes)
    with pytest.raises(VisarError, match="Linear is no causal decoder of transformers"):
        type("Bare", (ImageDecoder,), {"embed": None, "head": None})(nn.Linear(2, 2), 4)


class OwnCache(nn.Module):
    """A decoder that takes a cache and keeps its keys elsewhere, as one of another version would."""

    def __init__(self, inner: Any):
        super().__init__()
        self.inner, self.config, self.device, self.dtype = inner, inner.config, inner.device, inner.dtype

    def get_decoder(self) -> nn.Module:
        return self

    def get_input_embeddings(self) -> nn.Module:
        found: nn.Module = self.inner.get_input_embeddings()
        return found

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, cache: Any = None, use_cache: bool = True) -> Any:
        return self.inner(inputs_embeds=inputs_embeds, position_ids=position_ids, use_cache=False)


def test_a_pass_that_goes_by_the_cache_is_refused() -> None:
    world = causal("Qwen3", head_dim=12)
    world.model.model = OwnCache(world.model.model).eval()
    decoder = VocabularyDecoder(world.model, CODES)
    decoder.cache_name = "cache"  # which transformers names by version
    with pytest.raises(VisarError, match="elsewhere than in the cache that it was given"):
        logits(World(world.model, decoder))


def test_the_attention_is_visars_during_a_pass_only() -> None:
    """Of several passes at once, the last restores it; who calls the model meanwhile is told."""
    world = WORLDS["qwen3"]()
    configs = configurations(world.decoder.backbone)
    names = [c._attn_implementation for c in configs]
    with at_work(configs):
        with at_work(configs):
            pass
        with pytest.raises(VisarError, match="at work in visar, in another thread"):
            world.model(input_ids=torch.tensor([[1, 2]]))
    assert names == [c._attn_implementation for c in configs] and "visar" not in names
    assert world.model(input_ids=torch.tensor([[1, 2]])).logits.isfinite().all()


def test_configurations_within_others_get_their_own_name_back() -> None:
    """A name that is given to one of a Chameleon's is given to that of its image tokenizer too."""
    model = tiny_chameleon()
    outer, inner = model.config, model.config.vq_config
    outer._attn_implementation, inner._attn_implementation = "sdpa", "eager"
    with pytest.raises(RuntimeError, match="stop"), at_work(configurations(model.get_decoder())):
        assert outer._attn_implementation == "visar"
        raise RuntimeError("stop")
    assert (outer._attn_implementation, inner._attn_implementation) == ("sdpa", "eager")


def test_guidance_needs_unconditional_prompts() -> None:
    world = WORLDS["qwen3"]()
    without = World(world.model, world.decoder, scale=1.0)
    with torch.inference_mode():
        out = decode(without.session([0, 1, 2], 3), get_sampler("scd", window=3), Target(), Noise(0, torch.arange(3)))
        assert out.tokens.shape == (3, 5)
        with pytest.raises(VisarError, match="no unconditional prompts; give guidance_scale 1"):
            without.session([0], 3, guidance=Guidance(2.0))
