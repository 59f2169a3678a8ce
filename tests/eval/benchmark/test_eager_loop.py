"""The eager baseline agrees with the engine: the same logits, the same greedy images, the same distribution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers.tiny import GPT, class_gpt, text_gpt
from visar.engine.guidance import Guidance
from visar.engine.loop import decode
from visar.engine.rng import Noise
from visar.eval.benchmark.eager_loop import EagerLoop, generate, sample_tokens
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.session import LlamaGenSession
from visar.samplers import Autoregressive, Target

LENGTH, VOCAB = GPT["grid"] ** 2, GPT["vocab_size"]
GUIDANCES = (Guidance(), Guidance(3.0), Guidance(3.0, interval=0), Guidance(3.0, interval=6))


def case(kind: str) -> tuple[LlamaGen, Tensor, Tensor | None]:
    """A random model whose distributions are far from flat, two conditions, and for captions a left-padded mask."""
    torch.manual_seed(5)
    model = class_gpt() if kind == "class" else text_gpt()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.3)
    if kind == "class":
        return model, torch.tensor([2, 6]), None
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    return model, torch.randn(2, 4, 6) * mask[..., None], mask


@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
@pytest.mark.parametrize("kind", ["class", "text"])
def test_logits_are_those_of_the_session(kind: str, guidance: Guidance) -> None:
    model, condition, mask = case(kind)
    session = LlamaGenSession(model, condition, mask, length=LENGTH, window=1, guidance=guidance)
    loop = EagerLoop(model, condition, mask, length=LENGTH, guidance=guidance)
    tokens = torch.randint(0, VOCAB, (2, LENGTH))
    fed, got = torch.zeros(2, 1, dtype=torch.long), loop.prefill()
    for n in range(LENGTH):
        with torch.inference_mode():
            expected = session.forward(fed)[:, 0]
            session.commit(torch.ones(2, dtype=torch.long))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert expected.std() > 0.5  # logits that all look alike would prove nothing
        fed = tokens[:, n : n + 1]
        got = loop.step(tokens[:, n]) if n + 1 < LENGTH else got


@pytest.mark.parametrize("kind", ["class", "text"])
def test_greedy_tokens_are_those_of_ar(kind: str) -> None:
    model, condition, mask = case(kind)
    guidance = Guidance(2.0)
    session = LlamaGenSession(model, condition, mask, length=LENGTH, window=1, guidance=guidance)
    expected = decode(session, Autoregressive(), Target(top_k=1), Noise(0, torch.arange(2))).tokens
    got = generate(EagerLoop(model, condition, mask, length=LENGTH, guidance=guidance), top_k=1)
    assert torch.equal(got, expected) and len(got.unique()) > 3


@torch.inference_mode()
def test_going_on_in_the_middle_of_a_image() -> None:
    """What is timed in the middle is the step that an image takes there."""
    model, condition, mask = case("text")
    whole, middle = (EagerLoop(model, condition, mask, length=LENGTH, guidance=Guidance(2.0)) for _ in range(2))
    tokens = torch.randint(0, VOCAB, (10, 2))
    whole.prefill()
    for t in tokens:
        expected = whole.step(t)
    middle.keys.copy_(whole.keys)
    middle.values.copy_(whole.values)
    middle.skip_to(9)
    torch.testing.assert_close(middle.step(tokens[-1]), expected)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.7, 0), (1.3, 5), (1.0, 1), (1.0, 99)])
def test_draws_have_the_target_law(temperature: float, top_k: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(8)
    logits[3] = logits.topk(5).values[-1]  # a tie with the fifth is kept
    p = Target(temperature, top_k).probs(logits[None, None], torch.zeros(1, 1, dtype=torch.long))[0, 0]
    count = 40_000
    seen = torch.bincount(sample_tokens(logits.expand(count, -1), temperature, top_k), minlength=8)
    assert (seen[p == 0] == 0).all()
    z = (seen - count * p) / (count * p * (1 - p)).clamp_min(1e-9).sqrt()
    assert z[p > 0].abs().max() < 4.5 or top_k == 1
