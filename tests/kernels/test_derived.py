"""What is kept of weights goes when they change, however they do."""

from __future__ import annotations

import gc

import pytest
import torch

from visar.kernels.derived import WORDS, Derived, fingerprint, steady_weights

DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.bool)


@pytest.mark.parametrize("size", [0, 1, 3, 1000, WORDS + 5, 3 * WORDS])
def test_a_fingerprint_is_of_all_bytes(size: int) -> None:
    g = torch.Generator().manual_seed(size)
    x = torch.randint(0, 256, (4 * size,), generator=g, dtype=torch.uint8)
    mark = fingerprint(x)
    assert fingerprint(x.clone()) == mark
    for i in (torch.rand(20 if size else 0, generator=g) * 4 * size).long().tolist():
        y = x.clone()
        y[i] ^= 1 << (i % 8)
        assert fingerprint(y) != mark
    if size > 1:
        assert fingerprint(x.view(-1, 4).flip(0)) != mark
        y = x.clone().view(torch.int32)
        y[: size // 2] ^= -(2**31)  # the highest bits of many words
        assert fingerprint(y) != mark
    if size > WORDS:  # two blocks in another order
        y = x.view(torch.int32).clone()
        y[: len(y) - WORDS], y[WORDS:] = x.view(torch.int32)[WORDS:], x.view(torch.int32)[: len(y) - WORDS]
        assert fingerprint(y) != mark


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype_and_layout(dtype: torch.dtype) -> None:
    x = torch.randn(5, 7).to(dtype)
    assert fingerprint(x) == fingerprint(x.t().contiguous().t())
    with torch.inference_mode():
        assert fingerprint(x) == fingerprint(x.clone())


def test_kept_and_made_again() -> None:
    """Compared at every use, and within `steady_weights` at the first."""
    derived: Derived[float] = Derived()
    a, b, made = torch.ones(4), torch.ones(3), 0

    def value() -> float:
        def make() -> float:
            nonlocal made
            made += 1
            return float(a.sum() + b.sum())

        return derived.of([a, b], make)

    assert [value(), value(), made] == [7, 7, 1]
    b.data[1] = 5
    assert [value(), made] == [11, 2]
    b.numpy()[1] = 1
    with steady_weights():
        assert [value(), value(), made] == [7, 7, 3]
        with steady_weights():
            assert [value(), made] == [7, 3]
        a.numpy()[0] = 3
        assert value() == 7, "not looked at again"
    assert [value(), made] == [9, 4]
    b.data = torch.ones(5)
    assert value() == 11
    a.data = a.data.double()
    assert [value(), made] == [11, 6], "the dtype is another"
    assert len(derived) == 1


def test_values_go_with_their_weights() -> None:
    derived: Derived[int] = Derived()
    a, b = torch.ones(4), torch.ones(3)
    derived.of([a], int)
    derived.of([a, b], int)
    assert len(derived) == 2
    del b
    gc.collect()
    assert len(derived) == 1
    del a
    gc.collect()
    assert len(derived) == 0
