"""The invariant mode: a position's logits have the same bits whatever is computed next to it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from visar.engine.guidance import Guidance
from visar.engine.quantization import quantize
from visar.engine.tree import Tree
from visar.errors import VisarError
from visar.eval.benchmark.shapes import SHAPES
from visar.eval.exactness.dtype import Pass, difference, forced_logits, logits_by
from visar.families.base import Encoded
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.session import LlamaGenSession
from visar.generation.model import ImageModel
from visar.host import has_bfloat16
from visar.kernels.derived import steady_weights
from visar.kernels.invariant import invariant
from visar.params import SamplingParams
from visar.samplers import Target

PROMPTS = ("a red heart, 3d", "dog", "a cat, flat", "sun", "pizza", "a green apple, 3d", "bee", "fish, noto")
# W, B, and how many of a pass's tokens are committed.
PASSES = ((2, 1, 2), (5, 1, 5), (5, 1, 2), (16, 1, 16), (16, 8, 16), (64, 1, 64), (64, 8, 7), (1, 8, 1))


@pytest.fixture(scope="module")
def icons() -> ImageModel:
    return ImageModel.load("icons").to(dtype=torch.bfloat16)


def tokens_of(gpt: LlamaGen, count: int) -> Tensor:
    return torch.randint(gpt.config.vocab_size, (len(PROMPTS), count), generator=torch.Generator().manual_seed(0))


def logits(
    gpt: LlamaGen, encoded: Encoded, tokens: Tensor, window: int, batch: int, kept: int | None = None, on: bool = True,
    scale: float = 1.5,
) -> Tensor:  # fmt: skip
    """Of the first image, [N, V], by passes of `window` tokens in a batch of so many images."""
    with steady_weights(), invariant(on), torch.inference_mode():
        first = [part[:batch] for part in encoded]
        session = LlamaGenSession(gpt, *first, length=256, window=window, grid=16, guidance=Guidance(scale))
        return forced_logits(session, tokens[:batch], window, kept)[0]


def same_bits(gpt: LlamaGen, encoded: Encoded, count: int, passes: Sequence[tuple[int, int, int]] = PASSES) -> None:
    tokens = tokens_of(gpt, count)
    alone = logits(gpt, encoded, tokens, 1, 1)
    for window, batch, kept in passes:
        assert torch.equal(logits(gpt, encoded, tokens, window, batch, kept), alone), (window, batch, kept)
    unguided = [logits(gpt, encoded, tokens, w, b, scale=1.0) for w, b in ((1, 1), (16, 8))]
    assert torch.equal(*unguided) and not torch.equal(unguided[0], alone)


@pytest.mark.parametrize("weights", ["native", "int8"])
def test_icons(weights: str) -> None:
    model = ImageModel.load("icons").to(dtype=torch.bfloat16)
    model.quantize(weights)
    gpt: LlamaGen = model.family.model
    same_bits(gpt, model.family.encode(PROMPTS), 8)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["native", "int8"])
def test_the_shape_of_llamagen_b(weights: str) -> None:
    gpt = SHAPES["B-256"].make(torch.bfloat16, torch.device("cpu"))
    if weights != "native":
        quantize(gpt, weights)
    same_bits(gpt, (torch.arange(len(PROMPTS)) * 37,), 24)


@pytest.mark.slow
def test_all_of_an_image(icons: ImageModel) -> None:
    same_bits(icons.family.model, icons.family.encode(PROMPTS), 256)


@pytest.mark.skipif(not has_bfloat16(), reason="bfloat16 is emulated in another order here")
def test_the_default_mode_is_what_the_tests_catch(icons: ImageModel) -> None:
    """The known-bad: without the mode, most positions differ."""
    gpt, encoded = icons.family.model, icons.family.encode(PROMPTS)
    tokens = tokens_of(gpt, 20)
    alone, wide = (logits(gpt, encoded, tokens, w, 1, on=False) for w in (1, 16))
    assert (alone != wide).any(-1).float().mean() > 0.5 and (alone - wide).abs().max() < 1


def test_rows_that_come_and_go(icons: ImageModel) -> None:
    """A row has the same bits in whatever place, and however many there are."""
    gpt, tokens = icons.family.model, tokens_of(icons.family.model, 10)
    with steady_weights(), invariant(), torch.inference_mode():
        encoded = icons.family.encode(PROMPTS)
        session = LlamaGenSession(gpt, *encoded, length=256, window=5, grid=16, guidance=Guidance(1.5))
        forced_logits(session, tokens[:, :5], 5)
        every, rows = session.forward(tokens[:, 4:9]), torch.arange(len(PROMPTS))
        for chosen in ([6, 0, 3], [2, 1], [0, 1, 1, 0]):
            session.select(torch.tensor(chosen))
            rows = rows[chosen]
            assert torch.equal(session.forward(tokens[rows, 4:9]), every[rows])


def test_nodes_of_a_tree(icons: ImageModel) -> None:
    """A node's logits are those of a sequence with its ancestors, although these lie in other slots."""
    gpt, encoded = icons.family.model, icons.family.encode(PROMPTS[:1])
    tree = Tree.of([-1, 0, 0, 1, 1, 2, 3, 4, 4, 7, 8, 6, 9])
    fed, committed = tokens_of(gpt, 40)[:1], 11
    paths = {6: [1, 3, 6], 12: [1, 4, 7, 9, 12], 5: [2, 5], 10: [1, 4, 8, 10]}
    found: dict[bool, list[bool]] = {}
    for on in (True, False):
        with steady_weights(), invariant(on), torch.inference_mode():

            def session(window: int) -> LlamaGenSession:
                return LlamaGenSession(gpt, *encoded, length=256, window=window, grid=16, guidance=Guidance(1.5))

            grown = session(13)
            forced_logits(grown, fed[:, :committed], 1)
            nodes = torch.cat([fed[:, committed - 1 : committed], fed[:, committed : committed + 12]], dim=1)
            at_nodes = grown.forward(nodes, tree)
            same = []
            for node, path in paths.items():
                chain = torch.cat([fed[:, :committed], nodes[:, path], nodes[:, :1]], dim=1)
                same.append(torch.equal(forced_logits(session(1), chain, 1)[0, -1], at_nodes[0, node]))
            grown.keep(torch.tensor([paths[12]]))  # and what follows an accepted path
            grown.commit(torch.tensor([5]))
            more = torch.cat([fed[:, :committed], nodes[:, paths[12]], fed[:, :2]], dim=1)
            after = grown.forward(torch.cat([nodes[:, 12:], fed[:, :1]], dim=1))
            same.append(torch.equal(forced_logits(session(1), more, 1)[0, -2:], after[0]))
            found[on] = same
    assert all(found[True])
    assert not has_bfloat16() or not all(found[False])


def test_samplers_have_one_distribution(icons: ImageModel) -> None:
    """What `ar` samples has the same distribution by the passes of `scd`, and no image is impossible there."""
    # Images of 6 x 6 tokens.
    family = type(icons.family).of(icons.family.components, {**icons.family.settings, "grid": 6})
    model, prompts, found = ImageModel(family), PROMPTS[:4], {}
    model.bar = {"disable": True}
    for on in (True, False):
        settings = {"guidance_scale": 1.5, "top_k": 10, "invariant": on, "output_type": "tokens"}
        tokens = model.generate(prompts, sampler="ar", **settings).tokens
        encoded = family.encode(prompts)
        both = []
        for window in (1, 16):
            with steady_weights(), invariant(on), torch.inference_mode():
                made = family.session(encoded, window=window, guidance=Guidance(1.5))  # type: ignore[attr-defined]
                both.append(forced_logits(made, tokens, window))
        found[on] = difference(Pass("bfloat16", 1, on), Pass("bfloat16", 16, on), both, tokens, Target(top_k=10))
    same, other = found[True], found[False]
    assert same.equal and (same.tv_max, same.support, same.impossible, same.image_tv) == (0, 0, 0, 0)
    assert not has_bfloat16() or (other.tv_max > 0.01 and other.support > 0.05 and other.image_tv > 0)


@pytest.mark.parametrize("dtype", ["float32", *(["bfloat16"] if has_bfloat16() else [])])
def test_what_is_fed_again_is_computed_as_it_was(icons: ImageModel, dtype: str) -> None:
    family = type(icons.family).of(icons.family.components, {**icons.family.settings, "grid": 6})
    model, by = ImageModel(family).to(dtype=getattr(torch, dtype)), Pass(dtype, 1)
    model.bar = {"disable": True}
    tokens = model.generate(PROMPTS[:6], sampler="ar", guidance_scale=3.0, top_k=2, output_type="tokens").tokens
    p = Target(top_k=2).probs(logits_by(by, model, PROMPTS[:6], tokens, 3.0), torch.arange(36).expand(6, -1))
    assert (p.gather(-1, tokens[..., None]) > 0).all()


def test_the_setting() -> None:
    assert SamplingParams(invariant=True).to_dict()["invariant"] is True
    SamplingParams(invariant=False).check("continuous")
    with pytest.raises(VisarError, match="invariant is for models of discrete tokens"):
        SamplingParams(invariant=True).check("continuous")
    with pytest.raises(VisarError, match="invariant must be true or false, not 'yes'"):
        SamplingParams(invariant="yes")  # type: ignore[arg-type]
