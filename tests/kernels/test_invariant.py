"""Products, norms and attention whose rows do not depend on how many there are; tests of whole passes are in
`tests/engine/test_invariant.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.compiled import compiled, in_a_process
from visar.engine.layers import Linear, RMSNorm
from visar.engine.quantization import QuantizedLinear
from visar.kernels.attention import PART, AttentionMetadata, decode_attention
from visar.kernels.backend import backend, triton
from visar.kernels.invariant import ROWS, agreeing_rows, by_rows, invariant, is_invariant, product
from visar.kernels.product import (
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    _product,
    _rms_norm,
    product_torch,
    product_triton,
    rms_norm_torch,
    rms_norm_triton,
)

needs_triton = pytest.mark.skipif(triton is None, reason="torch brings Triton where it has GPU backends only")


def by_hand(x: Tensor, w: Tensor, parts: int) -> Tensor:
    """x @ w.T with the sum over K in so many parts, whatever the library does."""
    sums = [torch.stack([(a * w.float()[:, s]).sum(-1) for a in x.float()[:, s]]) for s in slices(x.shape[1], parts)]
    return sum(sums[1:], sums[0]).to(x.dtype)


def slices(size: int, parts: int) -> list[slice]:
    return [slice(size * i // parts, size * (i + 1) // parts) for i in range(parts)]


def few_differ(x: Tensor, w: Tensor, _: Tensor) -> Tensor:
    """A library that sums in two parts where there are fewer than four rows."""
    return by_hand(x, w, 2 if len(x) < 4 else 1)


def places_differ(x: Tensor, w: Tensor, _: Tensor) -> Tensor:
    """One whose last row is another than the first, wherever there is more than one."""
    return by_hand(x, w, 1) if len(x) == 1 else torch.cat([by_hand(x[:-1], w, 1), by_hand(x[-1:], w, 2)])


def twice_rounded(x: Tensor, w: Tensor, other: Tensor) -> Tensor:
    """One that adds what follows before it rounds where there are two rows or more, and after it where there is one."""
    y = by_hand(x.float(), w.float(), 1)
    return (y + other.float()).to(x.dtype) if len(x) > 1 else y.to(x.dtype) + other


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_row_counts_are_found_by_measurement(dtype: torch.dtype) -> None:
    for outputs, inputs in ((20, 96), (7, 33)):
        assert agreeing_rows(few_differ, outputs, inputs, dtype, False, 1, "plain") == ROWS[2:]
        assert agreeing_rows(places_differ, outputs, inputs, dtype, False, 1, "plain") == (1,)
        if dtype != torch.float32:
            assert agreeing_rows(twice_rounded, outputs, inputs, dtype, False, 1, "plain") == ROWS[1:]
    weight = torch.randn(20, 96).to(dtype)
    x = torch.randn(200, 96).to(dtype)
    for kind in (few_differ, places_differ):
        whole = by_rows(kind, weight, lambda rows, kind=kind: kind(rows, weight, rows), x)
        for first, rows in ((0, 1), (3, 2), (0, 5), (100, 64), (70, 130)):
            part = by_rows(kind, weight, lambda rows, kind=kind: kind(rows, weight, rows), x[first : first + rows])
            assert torch.equal(part, whole[first : first + rows]), (kind, rows)
    bare = few_differ(x[:1], weight, x), few_differ(x[:4], weight, x)[:1]
    assert not torch.equal(*bare) or dtype == torch.bfloat16  # what it protects from


@pytest.mark.parametrize("kind", ["bfloat16", "float32", "int8"])
def test_layers_at_all_row_counts(kind: str) -> None:
    """The layers of `icons`, with everything that may follow a product."""
    g = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if kind == "int8" else getattr(torch, kind)
    for inputs, outputs in ((256, 768), (768, 256), (100, 36)):
        layer: Any = Linear(inputs, outputs, bias=False).to(dtype)
        if kind == "int8":
            layer = QuantizedLinear(layer, "int8")
        x, other = torch.randn(140, inputs, generator=g).to(dtype), torch.randn(140, outputs, generator=g).to(dtype)
        for silu, name in ((False, ""), (True, "times"), (False, "plus")):
            with torch.no_grad(), invariant():
                rows = [
                    layer(x[i : i + 1], silu=silu, **({name: other[i : i + 1]} if name else {})) for i in range(140)
                ]
                for n in (2, 3, 5, 8, 13, 16, 32, 33, 64, 100, 128, 140):
                    many = layer(x[None, :n], silu=silu, **({name: other[None, :n]} if name else {}))
                    assert torch.equal(many[0], torch.cat(rows[:n])), (kind, inputs, name, n)


def test_norms_do_not_depend_on_rows() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        norm, x = RMSNorm(256).to(dtype), torch.randn(300, 256).to(dtype)
        with torch.no_grad():
            rows = torch.cat([norm(row[None]) for row in x])
            assert all(torch.equal(norm(x[None, :n])[0], rows[:n]) for n in (2, 7, 16, 64, 300))


def test_the_mode_is_of_a_thread_and_ends() -> None:
    assert not is_invariant()
    with invariant():
        assert is_invariant()
        with invariant(False):
            assert not is_invariant()
        with pytest.raises(KeyError), invariant():
            raise KeyError
        assert is_invariant()
    assert not is_invariant()


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_triton_product(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    for inputs, outputs in ((130, 70), (65, 3)):
        x, w = torch.randn(70, inputs, generator=g).to(dtype), torch.randn(outputs, inputs, generator=g).to(dtype)
        whole = product_triton(x, w)
        exact = x.double() @ w.double().T
        torch.testing.assert_close(whole.double(), exact, atol=1e-4, rtol=1e-5 if dtype == torch.float32 else 1e-2)
        torch.testing.assert_close(whole, product_torch(x, w), atol=1e-4, rtol=2e-2)
        for rows in (1, 5, 33, 64):
            assert torch.equal(product_triton(x[:rows], w), whole[:rows]), (inputs, rows)
        strided = torch.cat([x, x], dim=1)[:, :inputs]
        assert torch.equal(product_triton(strided, w), whole)
        with invariant(), backend("triton"):
            assert torch.equal(product(x, w), whole)
    assert product_triton(x[:0], w).shape == (0, 3)
    assert torch.equal(product(x, w), F.linear(x, w))


@needs_triton
def test_triton_norm() -> None:
    for dtype, size in ((torch.bfloat16, 256), (torch.float32, 100)):
        x, w = torch.randn(5, 3, size).to(dtype) * 4, torch.rand(size).to(dtype)
        whole = rms_norm_triton(x, w, 1e-5)
        torch.testing.assert_close(whole, rms_norm_torch(x, w, 1e-5), atol=1e-6, rtol=1e-2 if size == 256 else 1e-5)
        assert torch.equal(rms_norm_triton(x[2:3, 1:2], w, 1e-5), whole[2:3, 1:2])


def attended(queries: int, at: int, slots: int, group: int = 1) -> Tensor:
    """Attention of the positions `at`.., by the Triton form over a cache of so many slots."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4 * PART, heads, 16, generator=g) for heads in (group, 1, 1))
    with backend("triton"):
        metadata = AttentionMetadata(torch.tensor([at]))
        return decode_attention(q[:, at : at + queries], k[:, :slots], v[:, :slots], metadata, slots)


@pytest.mark.parametrize("size", [1.0, 1e-3])  # which is below the root of eps
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_against_fp64(size: float, dtype: torch.dtype) -> None:
    x, w = (size * torch.randn(3, 2, 48)).to(dtype), torch.randn(48).to(dtype)
    expected = torch.nn.functional.rms_norm(x.double(), w.shape, w.double(), 1e-5)
    found = rms_norm_torch(x, w, 1e-5)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=1e-9, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


@needs_triton
@pytest.mark.parametrize("group", [1, 5])
def test_triton_attention_has_one_order_of_sums(group: int) -> None:
    """Windows before and across a split's end, and caches of one to four splits."""
    at = PART - 2
    with invariant():
        alone = {i: attended(1, at + i, at + i + 1, group) for i in (0, 1, 2, 4)}
        for queries, slots in ((2, at + 2), (5, 2 * PART), (16, PART + 40), (64 // group, 3 * PART)):
            many = attended(queries, at, slots, group)
            assert all(torch.equal(many[:, i : i + 1], one) for i, one in alone.items() if i < queries), queries
    # The known-bad: the number of splits follows from the shape.
    assert not torch.equal(*(attended(n, at, slots)[:, :1] for n, slots in ((1, 400), (64, 3 * PART))))


@needs_triton
@pytest.mark.slow
def test_kernels_compile() -> None:
    in_a_process(__file__)


def compile_some() -> None:
    for dtype in ("bf16", "fp32", "fp16"):
        types = dict.fromkeys(_product.arg_names, "i32") | dict.fromkeys(("out", "x", "weight"), "*" + dtype)
        blocks = {"block_m": BLOCK_M, "block_n": BLOCK_N, "block_k": BLOCK_K, "widened": False}
        compiled(_product, types, blocks)
        types = dict.fromkeys(("out", "x", "weight"), "*" + dtype) | {"size": "i32", "eps": "fp32"}
        compiled(_rms_norm, types, {"block": 1024})


if __name__ == "__main__":
    compile_some()
