"""Linear layers with weights laid out for the CPU, against the library's product and fp64."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visar.engine.layers import Linear
from visar.errors import VisarError
from visar.host import has_bfloat16
from visar.kernels import backend, choice
from visar.kernels import linear as kernel
from visar.kernels.derived import steady_weights
from visar.kernels.linear import FORMS, epilogue, joined, linear, linear_form, packs, repeats

DTYPES = [torch.float32, *([torch.bfloat16] if has_bfloat16() else [])]
needs_onednn = pytest.mark.skipif(not packs(torch.float32), reason="this torch was built without oneDNN")


@pytest.fixture
def decoding() -> Iterator[None]:
    """As within a decoding."""
    with torch.no_grad(), steady_weights():
        yield


def exact(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return F.linear(x.double(), w.double(), None if b is None else b.double())


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(1,), (2,), (3, 1), (2, 1), (5,), (2, 16), (64, 1)])
@pytest.mark.parametrize("sizes", [(7, 5), (768, 2304)])
def test_against_fp64(dtype: torch.dtype, rows: tuple[int, ...], sizes: tuple[int, int], decoding: None) -> None:
    g = torch.Generator().manual_seed(0)
    x, w, b, other = (
        torch.randn(*shape, generator=g).to(dtype)
        for shape in ((*rows, sizes[0]), sizes[::-1], sizes[1:], (*rows, sizes[1]))
    )
    w = w / 16
    close: dict[str, Any] = dict(atol=2e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=0.05, rtol=0.02)
    for bias in (None, b):
        y = exact(x, w, bias)
        for given, wanted in (
            ({}, y),
            ({"silu": True}, F.silu(y)),
            ({"times": other}, y * other.double()),
            ({"plus": other}, y + other.double()),
            ({"silu": True, "times": other}, F.silu(y) * other.double()),
            ({"times": other, "plus": other}, y * other.double() + other.double()),
        ):
            for form in FORMS:
                with linear_form(form):
                    got = linear(x, w, bias, **given)  # type: ignore[arg-type]
                assert got.dtype == dtype
                torch.testing.assert_close(got.double(), wanted, **close)
                if form == "plain":
                    assert torch.equal(got, epilogue(F.linear(x, w, bias), **given))  # type: ignore[arg-type]


def packed(x: Tensor, layer: nn.Linear) -> Tensor:
    """The product of the packed form in a decoding of its own."""
    with torch.no_grad(), steady_weights(), linear_form("packed"):
        before = len(kernel._packed)
        y = linear(x, layer.weight, layer.bias)
        assert len(kernel._packed) >= before
    return y


@needs_onednn
def test_a_changed_weight_is_laid_out_again() -> None:
    """Also one that was changed behind the back of torch, in one element, or to and fro."""
    layer, x = Linear(8, 4), torch.randn(3, 8)

    def right() -> None:
        torch.testing.assert_close(packed(x, layer), F.linear(x, layer.weight, layer.bias), atol=1e-6, rtol=1e-6)

    w = layer.weight
    with torch.no_grad():
        for change in (
            lambda: w.mul_(2),
            lambda: w.data.copy_(torch.randn(4, 8)),
            lambda: w.detach().numpy().__setitem__((2, 3), 5.0),
            lambda: w.data[:, 1].neg_(),  # the highest bit of every second word
            lambda: w.data.copy_(w.flip(0)),  # the same numbers elsewhere
            lambda: setattr(w, "data", torch.randn(4, 8)),
            lambda: layer.load_state_dict(Linear(8, 4).state_dict()),
            lambda: torch.nn.utils.vector_to_parameters(torch.randn(36), layer.parameters()),
            lambda: layer.half().float(),
        ):
            right()
            change()
            right()
        layer.to(torch.float64)
        assert packed(x.double(), layer).dtype == torch.float64
        for dtype in DTYPES:
            layer.to(dtype)
            assert packed(x.to(dtype), layer).dtype == dtype
        twin = copy.deepcopy(layer)
        twin.weight.zero_()
        assert not torch.equal(packed(x.to(dtype), layer), packed(x.to(dtype), twin))


@needs_onednn
def test_the_second_copy_goes_with_the_weight() -> None:
    gc.collect()  # what other tests left behind
    before = len(kernel._packed)
    layer = Linear(8, 4)
    packed(torch.randn(1, 8), layer)
    assert len(kernel._packed) == before + 1
    del layer
    gc.collect()
    assert len(kernel._packed) == before


@needs_onednn
def test_products_of_one_input_share_a_copy_that_follows_the_weights() -> None:
    gc.collect()
    layers, x, before = [Linear(8, 4), Linear(8, 3)], torch.randn(2, 1, 8), len(kernel._packed)
    for form in FORMS:
        for scale in (1.0, 3.0):
            layers[1].weight.detach().numpy()[:] *= scale
            with torch.no_grad(), steady_weights(), linear_form(form):
                got = joined(x, [one.weight for one in layers], [one.bias for one in layers])
                wanted = torch.cat([F.linear(x, one.weight, one.bias) for one in layers], -1)
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert len(kernel._packed) == before + 1


@needs_onednn
def test_rows_are_repeated_where_that_was_measured_to_be_faster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VISAR_CACHE", str(tmp_path))
    monkeypatch.setenv(kernel.VARIABLE, "auto")
    layers, found = Linear(8, 4), "repeated"
    monkeypatch.setattr(choice, "_measured", lambda forms: found)
    with torch.no_grad():
        assert repeats(torch.randn(2, 1, 8), layers) == 1  # not a decoding
        with steady_weights():
            assert [repeats(torch.randn(n, 1, 8), layers) for n in (1, 2, 3, 4, 9)] == [4, 2, 1, 1, 1]
            with linear_form("packed"):
                assert repeats(torch.randn(2, 1, 8), layers) == 1


@needs_onednn
def test_a_residual_of_another_dtype(decoding: None) -> None:
    layer, x, other = Linear(8, 4), torch.randn(3, 8), torch.randn(3, 4).bfloat16()
    for given, wanted in (({"plus": other}, layer(x) + other), ({"times": other}, layer(x) * other)):
        got = layer(x, **given)  # type: ignore[arg-type]
        assert got.dtype == torch.float32 and torch.allclose(got, wanted, atol=1e-6)


def test_training_uses_the_library() -> None:
    layer, x, before = Linear(8, 4), torch.randn(3, 8), len(kernel._packed)
    plain = nn.Linear(8, 4)
    plain.load_state_dict(layer.state_dict())
    with steady_weights():
        for made in (layer, plain):
            made(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, plain.weight.grad)  # type: ignore[arg-type]
    with torch.no_grad():
        layer(x)  # not a decoding
    assert len(kernel._packed) == before


def test_what_is_not_packed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, decoding: None) -> None:
    """Another dtype, and a machine with no memory to spare, which says so once."""
    x, layer = torch.randn(2, 8), Linear(8, 4)
    half = Linear(8, 4).half()
    assert torch.equal(half(x.half()), F.linear(x.half(), half.weight, half.bias))
    assert not packs(torch.float16)
    monkeypatch.setattr(kernel, "available_memory", lambda: 64)
    backend.say_once.cache_clear()
    for part in (x, x[:1]):
        assert torch.equal(layer(part), F.linear(part, layer.weight, layer.bias))
    assert [r.message for r in caplog.records] == [
        "Too little memory to lay the weights out for this processor; decoding goes on, slower."
    ]


@needs_onednn
def test_the_fastest_form_is_taken_and_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One measurement for each shape, dtype and class of rows; "plain" keeps no second copy."""
    monkeypatch.setenv("VISAR_CACHE", str(tmp_path))
    monkeypatch.setenv(kernel.VARIABLE, "auto")
    timed: list[list[str]] = []
    winner = "plain"

    def measured(forms: dict[str, object]) -> str:
        timed.append(list(forms))
        return winner

    monkeypatch.setattr(choice, "_measured", measured)
    layer, before = Linear(8, 4), len(kernel._packed)
    twin = Linear(8, 4)
    with torch.no_grad():
        for rows in (2, 2, 5, 8, 64, 1000):
            for made in (layer, twin):
                with steady_weights():
                    made(torch.randn(rows, 8))
        assert timed == [["plain", "packed", "padded"], ["plain", "packed"], ["plain", "packed"]]
        assert len(kernel._packed) == before
        winner = "padded"
        with steady_weights():
            layer(torch.randn(3, 8), silu=True)
            layer(torch.randn(3, 8), silu=True)
    assert len(timed) == 4 and len(kernel._packed) == before + 1
    with steady_weights(), linear_form("packed"), torch.no_grad():
        twin(torch.randn(2, 8))
    assert len(timed) == 4 and len(kernel._packed) == before + 2


def test_an_unknown_form_is_refused(monkeypatch: pytest.MonkeyPatch, decoding: None) -> None:
    with pytest.raises(VisarError, match=r"form of linear layers.*quick"), linear_form("quick"):  # type: ignore[arg-type]
        pass
    monkeypatch.setenv(kernel.VARIABLE, "fast")
    with pytest.raises(VisarError, match="fast"):
        Linear(8, 4)(torch.randn(2, 8))


@needs_onednn
def test_measuring_prefers_what_is_faster_by_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every form does what it is named for, and the times of a real product choose among them."""
    w = torch.randn(256, 128)
    forms = kernel._forms(torch.ones(2, 128), w, None, False, None, None)
    with torch.no_grad():
        for run in forms.values():
            torch.testing.assert_close(run(3), w.sum(1).expand(2, -1), atol=1e-3, rtol=0)
        assert choice._measured(forms) in FORMS
        large = kernel._forms(torch.ones(4, 768), torch.randn(2304, 768), None, False, None, None)
        assert list(large) == ["plain", "packed"] and choice._measured(large) in FORMS


def test_compiled_and_exported_layers_are_the_librarys(decoding: None) -> None:
    """Inductor and exported programs know no layouts of ours, which training once met in its target's pass."""
    one, two, x = Linear(8, 4), Linear(4, 4), torch.randn(3, 8)
    layer = nn.Sequential(one, two)
    traced: list[str] = []

    def backend_of_ours(module: torch.fx.GraphModule, _: object) -> object:
        traced.append(module.code)
        return module.forward

    wanted = F.linear(F.linear(x, one.weight, one.bias), two.weight, two.bias)
    assert torch.equal(torch.compile(layer, backend=backend_of_ours)(x), wanted)
    program = torch.export.export(layer, (x,))
    assert torch.equal(program.module()(x), wanted)
    assert len(traced) == 1 and "linear" in traced[0] and "mkldnn" not in traced[0] + program.graph_module.code
