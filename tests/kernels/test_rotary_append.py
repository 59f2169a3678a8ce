"""Rotary positions and new cache slots in both forms against `rotate`, and against complex numbers in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.helpers.compiled import compiled, in_a_process
from visar.families.llamagen.rotary import rotary_table, rotate
from visar.kernels.backend import backend, triton
from visar.kernels.rotary_append import _turn_and_write, rotary_append, rotary_append_torch, rotary_append_triton

needs_triton = pytest.mark.skipif(triton is None, reason="torch brings Triton where it has GPU backends only")
FORMS = (rotary_append_torch,) if triton is None else (rotary_append_torch, rotary_append_triton)

# rows, W, heads of queries and of keys, head_dim, pairs of halves, whether the cache is [R, S, H, D] in memory or
# [R, H, S, D]
Shape = tuple[int, int, int, int, int, int, bool]
SHAPES: tuple[Shape, ...] = (
    (1, 1, 1, 1, 4, 0, True), (2, 1, 12, 12, 64, 16, False), (3, 5, 9, 9, 100, 0, True), (2, 17, 4, 4, 16, 8, False),
    (1, 33, 3, 3, 20, 5, True), (2, 3, 32, 2, 16, 0, False), (3, 1, 20, 10, 20, 10, True), (1, 5, 9, 1, 8, 0, False),
)  # fmt: skip


def turned(x: Tensor, table: Tensor) -> Tensor:
    """x [R, W, H, D] turned by `table` [R, W, D / 2, 2] in fp64."""
    angles = torch.complex(*table.double().unbind(-1)).unsqueeze(2)
    pairs = torch.complex(x[..., 0::2].double(), x[..., 1::2].double()) * angles
    return torch.stack([pairs.real, pairs.imag], dim=-1).flatten(-2)


def paired(dim: int, halves: int) -> Tensor:
    """Where the numbers of a head are, of which adjacent ones are a pair then."""
    return torch.cat([torch.arange(2 * halves).view(2, halves).t().flatten(), torch.arange(2 * halves, dim)])


def check(shape: Shape, dtype: torch.dtype, device: str) -> None:
    rows, queries, heads, shared, dim, halves, rows_first = shape
    seed = torch.Generator().manual_seed(rows + queries + dim)
    slots = torch.stack([torch.randperm(queries + 7, generator=seed)[:queries] for _ in range(rows)])
    table = rotary_table(2, 8, dim)[slots]  # of which the first two slots turn everything to 0
    if halves:
        table[:, :, halves:] = torch.tensor([1.0, 0.0])
    pairs = paired(dim, halves)
    back = pairs.argsort()
    qkv = torch.randn(rows, queries, heads + 2 * shared, dim, generator=seed).to(dtype)
    before = torch.randn(2, rows, queries + 7, shared, dim, generator=seed).to(dtype)
    q, k, v = qkv.split([heads, shared, shared], dim=2)

    for form in FORMS:
        cache = before.to(device) if rows_first else before.to(device).transpose(2, 3).contiguous().transpose(2, 3)
        cache = cache.clone()  # which keeps the strides
        out = form(qkv.to(device), table.to(device), *cache, slots.to(device), halves).cpu()
        after = cache.cpu()
        at = torch.arange(rows)[:, None], slots
        assert out.dtype == dtype and out.shape == q.shape
        for got, x in ((out, q), (after[0][at], k)):
            # A product that is fused with its sum is rounded once less, here in fp32 and then to the dtype.
            close = dict(rtol=max(torch.finfo(dtype).eps, 1e-6), atol=2e-6)
            torch.testing.assert_close(got, rotate(x[..., pairs], table)[..., back], **close)
            torch.testing.assert_close(got.double(), turned(x[..., pairs], table)[..., back], **close)
        assert torch.equal(after[1][at], v)
        untouched = torch.ones(rows, queries + 7, dtype=torch.bool)
        untouched[at] = False
        assert torch.equal(after[:, untouched], before[:, untouched])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_forms(shape: Shape, dtype: torch.dtype) -> None:
    check(shape, dtype, "cpu")


@pytest.mark.parametrize("form", FORMS)
def test_cache_of_more_precision_than_the_model(form: Callable[..., Tensor]) -> None:
    qkv, cache, slots = torch.randn(2, 3, 6, 8).bfloat16(), torch.zeros(2, 2, 9, 2, 8), torch.tensor([[4, 5, 6]] * 2)
    table = rotary_table(0, 3, 8)[slots]
    q, k, v = qkv.float().chunk(3, dim=2)
    out = form(qkv, table, *cache, slots)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, rotate(q, table), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(cache[0][:, 4:7], rotate(k, table), rtol=1e-6, atol=1e-6)
    assert torch.equal(cache[1][:, 4:7], v)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_forms_on_a_gpu(shape: Shape, dtype: torch.dtype) -> None:
    check(shape, dtype, "cuda")


@needs_triton
def test_dispatch_and_tables_that_are_shared_by_rows() -> None:
    qkv, cache, slots = torch.randn(2, 3, 6, 8), torch.zeros(2, 2, 9, 2, 8), torch.tensor([[1, 2, 3], [4, 5, 6]])
    shared = rotary_table(1, 3, 8)[1:4].expand(2, -1, -1, -1)
    for name, form in (("torch", rotary_append_torch), ("triton", rotary_append_triton)):
        with backend(name):  # type: ignore[arg-type]
            assert torch.equal(rotary_append(qkv, shared, *cache, slots), form(qkv, shared.clone(), *cache, slots))


@needs_triton
@pytest.mark.slow
def test_kernel_compiles() -> None:
    in_a_process(__file__)


if __name__ == "__main__":
    for dtype, heads, shared, dim in (("bf16", 12, 12, 64), ("bf16", 32, 2, 100), ("fp32", 20, 20, 64)):
        types = dict.fromkeys(_turn_and_write.arg_names, "i32") | {"table": "*fp32", "slots": "*i64"}
        types |= dict.fromkeys(("out", "qkv", "keys", "values"), "*" + dtype)
        sizes = {"heads": heads, "shared": shared, "dim": dim, "block_h": 8, "block_p": 32 if dim == 64 else 64}
        compiled(_turn_and_write, types, sizes)
