"""Linear layers with weights laid out for the CPU, against the library's product and fp64."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visar.engine.layers import Linear
from visar.host import has_bfloat16
from visar.kernels import backend
from visar.kernels import linear as kernel
from visar.kernels.linear import epilogue, linear, packs

DTYPES = [torch.float32, *([torch.bfloat16] if has_bfloat16() else [])]
needs_onednn = pytest.mark.skipif(not packs(torch.float32), reason="this torch was built without oneDNN")


def exact(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return F.linear(x.double(), w.double(), None if b is None else b.double())


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(1,), (2,), (3, 1), (2, 1), (5,), (2, 16), (64, 1)])
@pytest.mark.parametrize("sizes", [(7, 5), (768, 2304)])  # the second is large enough for rows to be padded
def test_against_fp64(dtype: torch.dtype, rows: tuple[int, ...], sizes: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    x, w, b, other = (
        torch.randn(*shape, generator=g).to(dtype)
        for shape in ((*rows, sizes[0]), sizes[::-1], sizes[1:], (*rows, sizes[1]))
    )
    w = w / 16
    close = dict(atol=2e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=0.05, rtol=0.02)
    with torch.inference_mode(False), torch.no_grad():
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
                got = linear(x, w, bias, **given)  # type: ignore[arg-type]
                assert id(w) in kernel._packed and got.dtype == dtype
                torch.testing.assert_close(got.double(), wanted, **close)
                plain = epilogue(F.linear(x, w, bias), **given)  # type: ignore[arg-type]
                torch.testing.assert_close(got, plain, **close)


@needs_onednn
def test_a_changed_weight_is_laid_out_again() -> None:
    layer, x = Linear(8, 4), torch.randn(3, 8)
    with torch.no_grad():
        layer(x)
        layer.weight.mul_(2)
        assert torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-6)
        layer.weight.data = torch.randn(4, 8)
        assert torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-6)
        layer.load_state_dict(Linear(8, 4).state_dict())
        assert torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-6)
        layer.to(torch.float64)
        assert layer(x.double()).dtype == torch.float64
        for dtype in DTYPES:
            layer.to(dtype)
            assert layer(x.to(dtype)).dtype == dtype
        twin = copy.deepcopy(layer)
        twin.weight.zero_()
        assert not torch.equal(layer(x.to(dtype)), twin(x.to(dtype)))


@needs_onednn
def test_the_second_copy_goes_with_the_weight() -> None:
    gc.collect()  # what other tests left behind
    before = len(kernel._packed)
    layer = Linear(8, 4)
    with torch.no_grad():
        layer(torch.randn(1, 8))
    assert len(kernel._packed) == before + 1
    del layer
    gc.collect()
    assert len(kernel._packed) == before


@needs_onednn
def test_a_residual_of_another_dtype() -> None:
    layer, x, other = Linear(8, 4), torch.randn(3, 8), torch.randn(3, 4).bfloat16()
    with torch.no_grad():
        for given, wanted in (({"plus": other}, layer(x) + other), ({"times": other}, layer(x) * other)):
            got = layer(x, **given)  # type: ignore[arg-type]
            assert got.dtype == torch.float32 and torch.allclose(got, wanted, atol=1e-6)


def test_training_uses_the_library() -> None:
    layer, x = Linear(8, 4), torch.randn(3, 8)
    plain = nn.Linear(8, 4)
    plain.load_state_dict(layer.state_dict())
    for made in (layer, plain):
        made(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, plain.weight.grad)  # type: ignore[arg-type]
    assert id(layer.weight) not in kernel._packed


def test_what_is_not_packed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Another dtype, and a machine with no memory to spare, which says so once."""
    x, layer = torch.randn(2, 8), Linear(8, 4)
    with torch.no_grad():
        half = Linear(8, 4).half()
        assert torch.equal(half(x.half()), F.linear(x.half(), half.weight, half.bias))
        assert not packs(torch.float16)
        monkeypatch.setattr(kernel, "available_memory", lambda: 64)
        backend.say_once.cache_clear()
        for _ in range(2):
            assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert [r.message for r in caplog.records] == [
        "Too little memory to lay the weights out for this processor; decoding goes on, slower."
    ]
