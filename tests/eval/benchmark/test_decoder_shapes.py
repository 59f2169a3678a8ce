"""`visar bench --shapes` on decoders of transformers: their counts are those of its modules, and rows are measured."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from visar.engine.quantization import QuantizedLinear, quantize
from visar.errors import VisarError
from visar.eval.benchmark import decoder_shapes, shapes
from visar.eval.benchmark.decoder_shapes import DECODERS, PROMPT, DecoderShape
from visar.eval.benchmark.random_decoders import generate, prompt_of
from visar.eval.benchmark.shapes import measure, shape_named
from visar.families.hf.sizes import SIZES, DecoderSize
from visar.families.hf.specs import listings

CPU = torch.device("cpu")


def tiny(name: str, guidance: float = 3.0, **more: Any) -> DecoderShape:
    sizes: dict[str, Any] = dict(
        layers=2, dim=32, heads=4, kv_heads=2, ffn=48, vocab=90, codes=16, tokens=20, context=256, head_dim=8
    )
    return DecoderShape(name, name, DecoderSize(**sizes | more), guidance, 0 if guidance == 1 else 8)


TINY = (
    tiny("janus", kv_heads=4, tokens=16, own_codes=True),
    tiny("glm", 1.0, head=18, norms=4, qkv_bias=True, guided=False),
    tiny("emu3", line_ends=4),
    tiny("qwen3", line_ends=4, qk_norm=16),
    tiny("chameleon", kv_heads=4, line_ends=4, qk_norm=128),
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "bandwidth", lambda device: 20.0)
    monkeypatch.setattr(decoder_shapes, "PROMPT", 8)


@pytest.mark.parametrize("shape", [*DECODERS.values(), *TINY], ids=lambda s: s.name)
def test_counts_are_those_of_the_modules(shape: DecoderShape) -> None:
    """Of the whole published size, on the meta device."""
    size, d = shape.size, shape.make(torch.bfloat16, torch.device("meta"))
    assert d.bytes_per_pass == 2 * shape.weights
    made = sum(p.numel() for p in d.model.parameters())  # type: ignore[attr-defined]
    images = 1_000_000 + 1.1 * size.dim**2 * size.own_codes  # the little that reads images and makes pixels
    assert shape.parameters <= made < shape.parameters + images
    assert (d.layers, d.dim, d.heads, d.head_dim) == (size.layers, size.dim, size.kv_heads, size.head_dim)
    assert d.vocab == shape.vocab and d.context == size.context >= shape.tokens
    assert {p.dtype for p in d.model.parameters()} == {torch.bfloat16} and torch.get_default_dtype() == torch.float32  # type: ignore[attr-defined]


@pytest.mark.parametrize("shape", TINY, ids=lambda s: s.name)
def test_layers_in_8_bits_are_those_weights_rounded(shape: DecoderShape) -> None:
    """They are made one after the other, and counted; what a model of 34 B parameters takes follows from the counts."""
    small = dataclasses.replace(shape, stored="int8")
    whole, d = shape.make(torch.float32, CPU), small.make(torch.float32, CPU)
    rounded = [m for m in d.backbone.layers.modules() if isinstance(m, QuantizedLinear)]
    assert len(rounded) == sum(isinstance(m, torch.nn.Linear) for m in whole.backbone.layers.modules())
    assert not any(t.is_meta for t in (*d.model.parameters(), *d.backbone.buffers()))  # type: ignore[attr-defined]
    assert d.bytes_per_pass == 4 * shape.weights - small.saved(torch.float32)
    assert small.streamed(2, torch.float32) == shape.streamed(2, torch.float32) - small.saved(torch.float32)
    wanted = shape.session(whole, 2, 4).forward(torch.zeros(2, 4, dtype=torch.long))
    quantize(whole.backbone, "int8")
    same = shape.session(whole, 2, 4).forward(torch.zeros(2, 4, dtype=torch.long))
    found = small.session(d, 2, 4).forward(torch.zeros(2, 4, dtype=torch.long))
    assert torch.equal(found, same) and not torch.equal(found, wanted)


def test_8_bits_take_half_of_an_h100_and_fp8_needs_a_gpu() -> None:
    cuda = torch.device("cuda")
    int8, native = (DECODERS[name].needed(1, 64, torch.bfloat16, cuda) for name in ("Emu3.5-1024-int8", "Emu3.5-1024"))
    assert 36 < int8 / 2**30 < 39 and native / int8 > 1.7
    with pytest.raises(VisarError, match=r"Emu3\.5-1024-fp8: fp8 weights need a GPU of compute capability 8\.9"):
        measure([DECODERS["Emu3.5-1024-fp8"]], dtypes=(torch.bfloat16,))


def test_every_published_decoder_has_a_floor() -> None:
    assert [listing.name for listing in listings()] == list(SIZES)
    ms = {listing.name: listing.floor_ms for listing in listings()}
    # Janus-Pro-7B: 6.17 B weights and 288 slots of both batches, 2 bytes each, at 3.35 TB/s.
    by_hand = 1e3 * 2 * (6_172_229_632 + 2 * 30 * 4096 * 2 * 288) / 3.35e12
    assert ms["janus-pro-7b"] == pytest.approx(by_hand)
    # tokens that end a row have keys, and cost no pass
    assert (SIZES["emu3-gen"].tokens, DECODERS["Emu3-720"].passes) == (90 * 91, 90 * 90)
    assert SIZES["glm-image"].streamed(1) == 8_225_873_920 + 2 * 40 * 2 * 128 * 640  # one batch: no guidance


ROWS = [pytest.param(s, marks=[pytest.mark.slow] if s.name in ("qwen3", "chameleon") else [], id=s.name) for s in TINY]


@pytest.mark.parametrize("shape", ROWS)
def test_rows(shape: DecoderShape) -> None:
    row = measure([shape], windows=(4,), batches=(2,), repeats=1, passes=2, dtypes=(torch.float32,)).rows[0]
    passes = {"janus": 16, "glm": 20}.get(shape.name, 16)  # of 20 tokens 4 end rows
    assert (row.name, row.batch, row.tokens, row.passes) == (shape.name, 2, shape.tokens, passes)
    assert list(row.ms_per_pass) == [1, 4] and min(row.ms_per_pass.values()) > 0
    assert row.stock_ms is not None and not row.note
    assert row.streamed_gb == shape.numbers(2) * 4 / 1e9
    assert row.seconds_per_image == pytest.approx(row.ms_per_pass[1] / 1e3 * row.passes / 2)
    assert {w: p.shares["gemm"] > 0 for w, p in row.profiles.items()} == {1: True, 4: True}


@pytest.mark.parametrize("shape", TINY, ids=lambda s: s.name)
def test_weights_are_random_and_numbers_in_order(shape: DecoderShape) -> None:
    d = shape.make(torch.float32, CPU)
    session = shape.session(d, 3, 4)
    assert len(session.cache.keys[0]) == 3 * shape.rows and session.prefix.tolist() == [8] * 3 * shape.rows
    logits = session.forward(torch.zeros(3, 4, dtype=torch.long))
    assert logits.isfinite().all() and 0.3 < logits[..., : shape.size.codes].std() < 60
    again = shape.session(shape.make(torch.float32, CPU), 3, 4)
    assert torch.equal(again.forward(torch.zeros(3, 4, dtype=torch.long)), logits)
    ids = prompt_of(2, 8, CPU)
    for sampling in ({}, {"top_k": 4}):
        assert generate(shape.kind, d, shape.size, ids, 5, shape.guidance, **sampling).shape == (2, 5)


def test_large_ones_are_refused_and_named_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shape_named("glm-image-1024") is DECODERS["GLM-Image-1024"] and PROMPT == 64
    monkeypatch.setattr(shapes, "free_memory", lambda device: 2**30)
    monkeypatch.setitem(shapes.DEFAULTS, "cpu", ("Emu3-720", "GLM-Image-1024"))
    rows = measure(dtypes=(torch.bfloat16,)).rows
    assert [r.note.split(" needs ")[0] for r in rows] == [
        f"{name} at batch 1 in bfloat16" for name in ("Emu3-720", "GLM-Image-1024")
    ]
    emu = DECODERS["Emu3.5-1024"].needed(1, 64, torch.bfloat16, torch.device("cuda")) / 2**30
    assert 64 < emu < 72  # in an H100
