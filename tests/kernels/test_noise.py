"""Noise from its counters: words and uniforms bit for bit, exponentials against float64, and races that are unmade."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers.compiled import compiled, in_a_process
from visar.kernels.backend import backend, triton
from visar.kernels.noise import ExponentialNoise, _exponential, _uniforms, exponential, uniforms, words

needs_triton = pytest.mark.skipif(triton is None, reason="torch brings Triton where it has GPU backends only")

SEEDS = ((0xFFFFFFFF, 77), (0, 0), (5, 0xFFFFFFFF))  # of each row
IMAGES, KEYS = (0, 5, 2**24 - 1), (0, 70_000, 2**32 - 1)


def rows(device: str) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.tensor(x, device=device) for x in (SEEDS, IMAGES, KEYS))  # type: ignore[return-value]


def positions(width: int, device: str) -> Tensor:
    """[3, width]: random, the highest, and every second column of something wider."""
    g = torch.Generator().manual_seed(width)
    at = torch.randint(0, 2**16, (3, 2 * width), generator=g).to(device)[:, ::2]
    at[0, 0] = 2**16 - 1
    return at


def check_uniforms(device: str) -> None:
    """Numbers and tensors as passes and trials, of one and several dimensions."""
    key, images, keys = rows(device)
    at = positions(5, device)
    turns = torch.arange(15, device=device).view(3, 5)
    cases = [(at, p, t) for p in (0, 1, 65535, turns[0, 3]) for t in (0, 1, 9)]
    cases += [(at, turns, torch.arange(5, device=device)), (at[:1], turns[:1], 0), (at[:, :, None], 3, 0)]
    cases += [(at[:, :, None].expand(-1, -1, 4), turns[0, 2], torch.arange(4, device=device)), (at[:, :1], 2, 0)]
    for place, passes, trial in cases:
        with backend("torch"):
            expected = uniforms(key, images, keys, place, passes, 3, trial)
        with backend("triton"):
            got = uniforms(key, images, keys, place, passes, 3, trial)
        for a, b in zip(expected, got, strict=True):
            assert a.dtype == b.dtype == torch.float64 and torch.equal(a, b)


def check_exponentials(device: str) -> None:
    key, images, keys = rows(device)
    for vocab, width in ((2, 5), (7, 1), (1000, 2), (2050, 2)):
        at, passes = positions(width, device), torch.tensor(3, device=device)
        lanes = torch.arange((vocab + 3) // 4, device=device)
        w = torch.stack(words(key, images, keys, at[..., None] + 0 * lanes, passes, 2, lanes), -1)
        true = -torch.log1p(-(w.flatten(-2)[..., :vocab].double() + 0.5) * 2.0**-32)
        for form in ("torch", "triton"):
            with backend(form):  # type: ignore[arg-type]
                e = exponential(key, images, keys, at, passes, 2, vocab)
            assert e.shape == (3, width, vocab) and e.dtype == torch.float32
            # u is rounded to fp32, and where e is large that is felt.
            assert ((e.double() - true).abs() < 4e-7 * true + 2.0**-24 * true.exp()).all(), form


@needs_triton
def test_uniforms_under_the_interpreter() -> None:
    check_uniforms("cpu")


@needs_triton
def test_exponentials_under_the_interpreter() -> None:
    check_exponentials("cpu")


@needs_triton
def test_small_exponentials_keep_their_digits() -> None:
    """The smallest of a vocabulary decide a exponential noise: none of their digits may be lost in 1 - u."""
    key, images, keys = rows("cpu")
    made = []
    for form in ("torch", "triton"):
        with backend(form):  # type: ignore[arg-type]
            made.append(exponential(key, images, keys, torch.arange(2).expand(3, -1), 0, 4, 2048).flatten())
    small = made[0].topk(50, largest=False).indices
    assert made[0][small].max() < 0.01
    torch.testing.assert_close(made[1][small], made[0][small], rtol=3e-7, atol=0)


def test_exponential_noise_is_made_of_its_own_columns() -> None:
    key, images, keys = rows("cpu")
    noise = ExponentialNoise(key, images, keys, positions(6, "cpu"), 4, 3, 11)
    whole = noise.make()
    assert torch.equal(whole, exponential(key, images, keys, noise.positions, 4, 3, 11))
    assert torch.equal(noise[:, 1:-1].make(), whole[:, 1:-1])


@needs_triton
@pytest.mark.slow
def test_kernels_compile() -> None:
    in_a_process(__file__)


@pytest.mark.gpu
def test_kernels_on_a_gpu() -> None:
    check_uniforms("cuda")
    check_exponentials("cuda")


if __name__ == "__main__":
    pointers = {n: "*i64" for n in ("key", "images", "keys", "positions", "passes", "trial")} | {"out": "*fp64"}
    types = {n: "i32" for n in (*_uniforms.arg_names, *_exponential.arg_names)} | pointers
    compiled(_uniforms, types, dict(purpose=1, turn_read=True, lane_read=True, block=128))
    numbers = {"passes": "i32", "trial": "i32"}
    compiled(_uniforms, types | numbers, dict(purpose=1, turn_read=False, lane_read=False, block=128))
    compiled(_exponential, types | {"out": "*fp32"}, dict(purpose=3, turn_read=True, block=1024))
