"""Philox4x32-10: the published known answers, plain integers, and the Triton kernel bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers.compiled import compiled, in_a_process
from visar.kernels.backend import triton
from visar.kernels.philox import _fill, philox, philox_numpy, philox_torch, philox_triton

needs_triton = pytest.mark.skipif(triton is None, reason="torch brings Triton where it has GPU backends only")

# Counter, key and result, from the known-answer file of Random123, the authors' library.
KNOWN = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)
EXTREMES = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def words(text: str) -> list[int]:
    return [int(w, 16) for w in text.split()]


def plain(key: tuple[int, ...], counter: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 as the paper writes it, with Python's unbounded integers."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        high_0, low_0 = divmod(0xD2511F53 * c0, 2**32)
        high_1, low_1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def counters(count: int) -> Tensor:
    """Random counters [4, count] of 32 bits, with extreme words in front."""
    c = torch.randint(0, 2**32, (4, count), generator=torch.Generator().manual_seed(0))
    for i, word in enumerate(EXTREMES):
        c[:, i] = word
        c[i % 4, len(EXTREMES) + i] = word
    return c


KEYS = ((0, 0), (1, 1), (7, 0), (0x7FFFFFFF, 0x80000000), (0xFFFFFFFF, 0xFFFFFFFF), (0xA4093822, 0x299F31D0))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    c = tuple(torch.tensor([w]) for w in words(counter))
    assert [int(w) for w in philox(torch.tensor(words(key)), c)] == words(expected)
    assert plain(tuple(words(key)), tuple(words(counter))) == tuple(words(expected))


@pytest.mark.parametrize("key", KEYS)
def test_reference_equals_plain_integers(key: tuple[int, int]) -> None:
    c = counters(200)
    got = torch.stack(philox_torch(torch.tensor(key), tuple(c)))
    assert torch.equal(torch.stack(philox_numpy(torch.tensor(key), tuple(c))), got)
    square = torch.stack(philox_numpy(torch.tensor(key), tuple(c.view(4, 10, 20))))
    assert torch.equal(square.flatten(1), got)
    assert got.T.tolist() == [list(plain(key, tuple(column))) for column in c.T.tolist()]
    # Rows with keys of their own.
    keys = torch.tensor([key, (7, 9), *[KEYS[-1]] * 8])
    for form in (philox_torch, philox_numpy):
        rows = torch.stack(form(keys.T[..., None].contiguous(), tuple(c.view(4, 10, 20))))
        assert torch.equal(rows[:, 0], got[:, :20])
        assert torch.equal(rows[:, 1], torch.stack(form(keys[1], tuple(c.view(4, 10, 20)[:, 1]))))


def check_kernel(device: str) -> None:
    """`philox_triton` against `philox`: several keys, a size that fills no block, two dimensions, broadcasting."""
    for key in torch.tensor(KEYS, device=device):
        c = counters(1000).to(device)
        for shape in ((4, 1000), (4, 25, 40)):
            expected = torch.stack(philox_torch(key, tuple(c.view(shape))))
            got = torch.stack(philox_triton(key, tuple(c.view(shape))))
            assert got.dtype == torch.int64 and torch.equal(got, expected), key
    row, column, one = torch.arange(3, device=device)[:, None], torch.arange(5, device=device), c[0, :1]
    spread = (row, column, one, row)
    expected = torch.stack(philox(key, torch.broadcast_tensors(*spread)))
    assert torch.equal(torch.stack(philox_triton(key, spread)), expected)


@needs_triton
def test_kernel_under_the_interpreter() -> None:
    check_kernel("cpu")


@needs_triton
@pytest.mark.slow
def test_kernel_compiles() -> None:
    in_a_process(__file__)


@pytest.mark.gpu
def test_kernel_on_a_gpu() -> None:
    check_kernel("cuda")


if __name__ == "__main__":
    types = {"out": "*i64", "counters": "*i64", "key": "*i64", "size": "i32"}
    compiled(_fill, types, {"block": 256})
