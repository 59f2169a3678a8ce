"""LlamaGen with two-way heads: published layouts, the definition written out plainly, and the pass with a cache."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.published import gpt_arguments
from tests.helpers.tiny import text_gpt
from tests.helpers.two_way import CAPTIONS, GRID, MASK, SIZES, fed, gpt, inputs, session
from visar.engine.diagonals import Diagonals
from visar.engine.guidance import Guidance
from visar.engine.layout import Layout
from visar.engine.weight_files import read_content
from visar.errors import VisarError
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.loading import class_of, gpt_config, load_gpt, two_way_config
from visar.families.llamagen.rotary import rotate
from visar.families.llamagen.specs import MODELS
from visar.families.llamagen.two_way import TwoWayLlamaGen, is_branch, two_way

HEADS = {"medusa_norm.weight", "medusa_output.weight"}
GATE = {"hv_gate_mlp.0.weight", "hv_gate_mlp.2.weight", "hv_gate_mlp.2.bias"}
LAYER = {
    f"{part}.weight"
    for part in (
        "attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "attention_norm",
        "ffn_norm",
    )
}  # fmt: skip


# Published files


def nar(**changes: Any) -> dict[str, Tensor]:
    """A file in NAR's layout: LlamaGen's keys, one more layer, and a second norm and head."""
    model = gpt("class", mixing="mean", vertical_layers=1, vertical_start=3, **changes)
    return {key: value.clone() for key, value in model.state_dict().items()}


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def test_keys_are_the_published_ones() -> None:
    trunk = {k for k in nar() if not k.startswith(("medusa", "layers.3"))}
    assert trunk == set(LlamaGen(**{k: v for k, v in SIZES.items()}, classes=7).state_dict())
    assert set(nar()) - trunk == HEADS | {f"layers.3.{name}" for name in LAYER}
    assert set(gpt("class", mixing="gate").state_dict()) - set(gpt("class", mixing="mean").state_dict()) == GATE
    assert set(gpt("class", mixing="scalar").state_dict()) - set(gpt("class").state_dict()) == {"hv_mix_logit"}


@pytest.mark.parametrize("nested", [False, True])
def test_nar_loads_unchanged(nested: bool, tmp_path: Path) -> None:
    state = nar()
    content = {"model": state, "args": argparse.Namespace(medusa_attention_num=1), "steps": 1} if nested else state
    path = saved(tmp_path / "c2i_L_256.pt", content)
    loaded = load_gpt(path, num_heads=2, grid=GRID)
    assert isinstance(loaded, TwoWayLlamaGen) and class_of(path) is TwoWayLlamaGen
    c = loaded.config
    assert (c.num_layers, c.vertical_layers, c.vertical_start, c.mixing) == (3, 1, 3, "mean")
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in state.items())
    assert load_gpt(path, num_heads=2).config.grid == 16


@pytest.mark.parametrize("told", [
    {"vertical_start_layer": 1, "medusa_attention_num": 2},
    {"vertical_start_layer": -1, "medusa_attention_num": 2, "vertical_start_last_minus_depth": True},
    {"vertical_start_layer": -1, "medusa_attention_num": 2},
    {"vertical_start_layer": 9, "medusa_attention_num": 2},
])  # fmt: skip
def test_flashar_loads_unchanged(told: dict[str, Any], tmp_path: Path) -> None:
    """Where the branch starts is in the arguments of training only."""
    start = {1: 1, 9: 3}.get(told["vertical_start_layer"], 1 if "vertical_start_last_minus_depth" in told else 3)
    model = gpt("text", vertical_start=start)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    content = {"model": state | {"hv_mix_logit": torch.zeros(())}, "args": argparse.Namespace(**told)}
    loaded = load_gpt(saved(tmp_path / "last.pt", content), num_heads=2, grid=GRID)
    assert isinstance(loaded, TwoWayLlamaGen) and loaded.config == model.config
    condition, mask, tokens = inputs("text")
    assert torch.equal(loaded(condition, tokens[:, :-1], mask), model(condition, tokens[:, :-1], mask))


def test_a_branch_that_nobody_describes(tmp_path: Path) -> None:
    state = gpt("class").state_dict()
    for content, message in (
        (state, r"does not say where its branch starts.*'vertical_start_layer': 11"),
        ({"model": state, "args": {"vertical_start_layer": 1, "medusa_attention_num": 9}}, "has 5 layers, and its arg"),
        ({"model": state, "args": {"vertical_start_layer": "x"}}, "has 5 layers, and its arguments"),
    ):
        with pytest.raises(VisarError, match=message):
            load_gpt(saved(tmp_path / "gpt.pt", content), num_heads=2)
    del (short := nar())["medusa_norm.weight"]
    with pytest.raises(VisarError, match=r"'medusa_norm\.weight' is missing"):
        load_gpt(saved(tmp_path / "gpt.pt", short), num_heads=2)
    assert class_of(saved(tmp_path / "plain.pt", {"model": text_gpt().state_dict()})) is LlamaGen


PARAMETERS = {"b": 130.6, "m": 295.5, "l": 372.5, "xl": 816.0, "xxl": 1464.0}  # millions, of NAR's table


@pytest.mark.parametrize("size", PARAMETERS)
def test_published_nar_sizes(size: str) -> None:
    """Heads and layers follow from the shapes, also for M, a size that LlamaGen does not have."""
    name = "l" if size == "m" else size
    arguments = gpt_arguments(MODELS[f"llamagen-{name}"]) | ({"num_layers": 18} if size == "m" else {})
    with torch.device("meta"):
        model = TwoWayLlamaGen(**arguments, vertical_layers=1, vertical_start=arguments["num_layers"])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(
        PARAMETERS[size], abs=0.1 if size != "xxl" else 1
    )
    found = two_way_config(model.state_dict(), "x.pt", {})
    assert found["num_heads"] == arguments["num_heads"] and found["num_layers"] == arguments["num_layers"]
    assert {k: found[k] for k in gpt_config(model.state_dict(), "x.pt", num_heads=1, branch=1)} == {
        k: arguments[k] for k in found.keys() & arguments.keys()
    }


def test_own_folder(tmp_path: Path) -> None:
    """Of a LlamaGen's folder a two-way model is read as one."""
    model = gpt("text")
    model.save_pretrained(tmp_path)
    assert "hv_gate_mlp.0.weight" in read_content(tmp_path / "diffusion_pytorch_model.safetensors")
    for kind in (LlamaGen, TwoWayLlamaGen):
        loaded = kind.from_pretrained(tmp_path)
        assert isinstance(loaded, TwoWayLlamaGen) and loaded.config == model.config
        assert all(torch.equal(loaded.state_dict()[k], v) for k, v in model.state_dict().items())
    text_gpt().save_pretrained(tmp_path)
    with pytest.raises(VisarError, match="holds a LlamaGen, not a TwoWayLlamaGen"):
        TwoWayLlamaGen.from_pretrained(tmp_path)


# The definition


def plain(model: TwoWayLlamaGen, condition: Tensor, image: Tensor, mask: Tensor | None) -> Tensor:
    """Logits [N, V] of one image [N], from the definition: for each cell two inputs, by loops."""
    c, side = model.config, model.config.grid
    before = c.condition_length
    x = torch.cat([model.cls_embedding(condition[None])[0], model.tok_embeddings(image[:-1])])
    cells = [None] * before + [divmod(n, side) for n in range(side * side - 1)]
    valid = [True] * len(x) if mask is None else [*mask.tolist(), *[True] * (len(x) - before)]
    allowed = torch.zeros(len(x), len(x), dtype=torch.bool)
    for i, query in enumerate(cells):
        for j, key in enumerate(cells):
            if query is None:
                allowed[i, j] = key is None and j <= i and valid[j]
            else:
                allowed[i, j] = valid[j] if key is None else sum(key) <= sum(query)
            allowed[i, j] |= i == j
    table = model.rotary()[: len(x)]

    def block(layer: Any, h: Tensor) -> Tensor:
        qkv = layer.attention.wqkv(layer.attention_norm(h)).unflatten(-1, (3 * c.num_heads, -1))
        q, k, v = qkv.split(c.num_heads, dim=1)
        q, k = rotate(q, table), rotate(k, table)
        scores = torch.einsum("qhd,khd->hqk", q, k) * model.head_dim**-0.5
        weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
        h = h + layer.attention.wo(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        y, f = layer.ffn_norm(h), layer.feed_forward
        return h + f.w2(torch.nn.functional.silu(f.w1(y)) * f.w3(y))

    outputs = [x]
    for layer in list(model.layers)[: c.num_layers]:
        outputs.append(block(layer, outputs[-1]))
    below = outputs[c.vertical_start]
    for layer in list(model.layers)[c.num_layers :]:
        below = block(layer, below)
    right = model.output(model.norm(outputs[-1])).float()
    below = model.medusa_output(model.medusa_norm(below)).float()
    out = []
    for n in range(side * side):
        r, column = divmod(n, side)
        one = right[before - 1 if n == 0 else before + n - 1]
        other = below[before - 1 if n == 0 else before + n - side] if r or not n else None
        if n and not column:
            assert other is not None
            out.append(other)
        elif other is None:
            out.append(one)
        else:
            pair = torch.cat([one, other])
            share = torch.tensor(0.5)
            if model.hv_mix_logit is not None:
                share = torch.sigmoid(model.hv_mix_logit)
            if model.hv_gate_mlp is not None:
                centred = pair - pair.mean()
                share = torch.sigmoid(model.hv_gate_mlp((centred / centred.square().mean().sqrt()).clamp(-6, 6)))
            out.append(share * one + (1 - share) * other)
    return torch.stack(out)


@pytest.mark.parametrize("kind", ["text", "class"])
@pytest.mark.parametrize("mixing", ["mean", "scalar", "gate"])
def test_the_definition(kind: str, mixing: str) -> None:
    condition, mask, tokens = inputs(kind)
    for start, layers in ((1, 2), (3, 1)):
        model = gpt(kind, mixing=mixing, vertical_start=start, vertical_layers=layers)
        found = model(condition, tokens[:, :-1], mask)
        for b in range(len(tokens)):
            wanted = plain(model, condition[b], tokens[b], None if mask is None else mask[b])
            torch.testing.assert_close(found[b], wanted, atol=2e-5, rtol=1e-4)
    with pytest.raises(VisarError, match=f"reads {GRID**2 - 1} tokens of an image, not 3"):
        model(condition, tokens[:, :3], mask)


def test_a_cell_depends_on_the_diagonals_before_its_own() -> None:
    model, (condition, mask, tokens) = gpt("class"), inputs("class")
    plain = model(condition, tokens[:, :-1], mask)
    when = Diagonals.of(Layout(GRID, GRID)).when
    for cell in range(GRID**2 - 1):
        other = tokens.clone()
        other[:, cell] = (other[:, cell] + 1) % SIZES["vocab_size"]
        moved = (model(condition, other[:, :-1], mask) - plain).abs().amax((0, 2)) > 1e-6
        assert torch.equal(moved, when > when[cell])


# The cache


@pytest.mark.parametrize("kind", ["text", "class"])
@pytest.mark.parametrize("mixing", ["mean", "gate"])
def test_passes_with_a_cache_are_the_whole_sequence(kind: str, mixing: str) -> None:
    """Rows at diagonals of their own, in a cache full of what must never be read."""
    model, (condition, mask, tokens) = gpt(kind, mixing=mixing), inputs(kind)
    guidance = Guidance(2.0)
    s = session(model, kind, guidance)
    s.cache.keys[:, :, 1:] = s.cache.values[:, :, 1:] = 1e3
    null = model.cls_embedding.null_like(condition)
    both = [model(one, tokens[:, :-1], mask) for one in (condition, null)]
    wanted = guidance.combine(*both, torch.zeros(tokens.shape, dtype=torch.long))
    table, turn = Diagonals.of(Layout(GRID, GRID)), 0
    while bool((s.lengths < GRID**2).any()):
        d = table.of_length[s.lengths]
        found = s.forward_diagonal(fed(tokens, d))
        for b in range(len(tokens)):
            cells = table.cells[d[b], : int(table.count[d[b]])]
            torch.testing.assert_close(found[b, : len(cells)], wanted[b, cells], atol=1e-5, rtol=1e-5)
        moves = (torch.arange(len(tokens)) + turn) % 3 > 0  # a row that does not commit is fed again
        s.commit(table.count[d] * moves)
        turn += 1
    assert turn > 2 * GRID - 1


def test_the_model_has_no_raster_order() -> None:
    s = session(gpt("class"), "class")
    for call in (lambda: s.forward(torch.zeros(3, 1)), lambda: s.forward_at(*[torch.zeros(3, 1)] * 3)):
        with pytest.raises(VisarError, match="samples an image diagonal by diagonal"):
            call()


# Making one


def test_a_branch_starts_as_the_trunks_last_layers() -> None:
    torch.manual_seed(0)
    trunk = text_gpt()
    model = two_way(trunk, 2)
    assert (model.config.vertical_start, model.config.vertical_layers, model.config.gate_width) == (0, 2, 32)
    own, its = model.state_dict(), trunk.state_dict()
    for key, value in its.items():
        assert torch.equal(own[key], value)
        number, _, name = key.removeprefix("layers.").partition(".")
        if key.startswith("layers."):
            assert torch.equal(own[f"layers.{int(number) + 2}.{name}"], value)
    assert torch.equal(own["medusa_output.weight"], its["output.weight"])
    assert {k for k in own if not is_branch(k, 2)} == set(its)
    tokens, logits = torch.randint(24, (3, 24)), torch.randn(3, 5, 24)
    assert model.share(logits, logits.flip(0)).eq(0.5).all()
    assert torch.equal(model.trunk(CAPTIONS, tokens, MASK), trunk(CAPTIONS, tokens, MASK))
    with pytest.raises(VisarError, match="has 1 to 2 layers, as the trunk, not 3"):
        two_way(trunk, 3)
    with pytest.raises(VisarError, match="from 0 to 3, not 4"):
        gpt("class", vertical_start=4)
