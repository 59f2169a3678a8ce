"""Samples against plain sums in float64, at the ends of distributions, and races against the noise made in full."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers.compiled import compiled, in_a_process
from visar.kernels.backend import backend, triton
from visar.kernels.noise import ExponentialNoise
from visar.kernels.sample import _sample, _sample_gumbel, sample, sample_gumbel, tiles

needs_triton = pytest.mark.skipif(triton is None, reason="torch brings Triton where it has GPU backends only")

LOWEST, HIGHEST = 2.0**-53, 1 - 2.0**-53  # the extreme uniforms that the noise can give


def weights(vocab: int, shape: tuple[int, ...] = (2, 3), zeros: float = 0.4) -> Tensor:
    g = torch.Generator().manual_seed(vocab)
    w = torch.rand(*shape, vocab, generator=g) ** 4
    w[torch.rand(w.shape, generator=g) < zeros] = 0
    w[..., vocab // 2] += 1e-3
    return w * 2.7


def slow(w: Tensor, u: float) -> int:
    """The first token whose cumulative weight is above u times the total, one by one."""
    total, goal = 0.0, u * float(w.double().sum())
    for token, weight in enumerate(w.tolist()):
        total += weight
        if total > goal:
            return token
    return len(w) - 1


def uniform(shape: torch.Size) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def check_sample(device: str) -> None:
    for vocab in (2, 7, 1000, 16387):
        w = weights(vocab)
        u = uniform(w.shape[:-1])
        expected = [[slow(w[b, k], float(u[b, k])) for k in range(3)] for b in range(2)]
        assert sample(w.to(device), u.to(device)).tolist() == expected
        assert sample(w.double().to(device), u.to(device)).tolist() == expected
    # Shapes: none, one, four; and distributions that are views.
    w = weights(50, (4, 3, 2, 2)).to(device)
    u = uniform(w.shape[:-1]).to(device)
    whole = sample(w, u)
    assert whole.shape == u.shape
    assert torch.equal(sample(w[1, 2, 1, 0], u[1, 2, 1, 0]), whole[1, 2, 1, 0])
    assert torch.equal(sample(w[:, 1, 1, 0], u[:, 1, 1, 0]), whole[:, 1, 1, 0])
    assert torch.equal(sample(w[:, 1, :, 0], u[:, 1, :, 0]), whole[:, 1, :, 0])
    one = w[1:2, 1:2, 1, 0].expand(2, 3, -1)
    assert torch.equal(sample(one, u[:2, :, 1, 0]), sample(one.contiguous(), u[:2, :, 1, 0].contiguous()))
    flat = torch.full((), 0.25, device=device).expand(2, 3, 8)  # a uniform distribution is a number
    assert torch.equal(sample(flat, u[:2, :, 1, 0]), (u[:2, :, 1, 0] * 8).long())
    turned = weights(6, (9,)).to(device).T  # tokens side by side in no row
    assert torch.equal(sample(turned, u.flatten()[:6]), sample(turned.contiguous(), u.flatten()[:6]))
    assert sample(w[:0], u[:0]).shape == u[:0].shape


def check_ends(device: str) -> None:
    """The extreme uniforms take the first and the last token with any weight, and no weight at all takes none."""
    for vocab in (3, 300, 8192, 9000):
        w = torch.rand(6, vocab, generator=torch.Generator().manual_seed(1)).pow(8).to(device)
        w[:, 1:-1] += 1e-12
        w[:, 0] = w[:, -1] = 0
        for u, expected in ((LOWEST, 1), (HIGHEST, vocab - 2)):
            at = sample(w, torch.full((6,), u, dtype=torch.float64, device=device))
            assert (w.gather(-1, at[:, None]) > 0).all()
            assert (at == expected).all() or vocab > 3
        # All weight in one token, wherever its block.
        for token in {0, vocab // 2, vocab - 1}:
            point = torch.zeros(2, vocab, device=device)
            point[:, token] = 1e-20
            ends = torch.tensor([LOWEST, HIGHEST], dtype=torch.float64, device=device)
            assert sample(point, ends).tolist() == [token, token]
        nothing = sample(torch.zeros(1, vocab, device=device), torch.tensor([0.5], device=device).double())
        assert nothing.tolist() == [vocab - 1]


def gumbel_max(vocab: int, device: str, width: int = 3) -> ExponentialNoise:
    images, at = torch.arange(2, device=device), torch.arange(2 * width, device=device).view(2, width)
    key = torch.stack([images + 5, images + 6], dim=1)
    return ExponentialNoise(key, images, images + 9, at, images[:, None] + 2, 3, vocab)


def check_gumbel(device: str) -> None:
    for vocab, width in ((2, 3), (7, 3), (1000, 3), (8195, 1)):
        p, noise = weights(vocab, (2, width)).to(device), gumbel_max(vocab, device, width)
        made, winners = noise.make(), sample_gumbel(p, noise)
        assert torch.equal(winners, (p / made).argmax(-1))
        assert torch.equal(sample_gumbel(p[:, 1:], noise[:, 1:]), winners[:, 1:])
        one = torch.full((), 1 / vocab, device=device).expand(2, width, vocab)
        assert torch.equal(sample_gumbel(one, noise), made.argmin(-1))
    nothing = sample_gumbel(torch.zeros(2, 1, 9000, device=device), gumbel_max(9000, device, 1))
    assert (nothing == 0).all()


@pytest.mark.parametrize("check", [check_sample, check_ends, check_gumbel])
def test_plain_form(check: object) -> None:
    with backend("torch"):
        check("cpu")  # type: ignore[operator]


@needs_triton
@pytest.mark.parametrize("check", [check_sample, check_ends, check_gumbel])
def test_kernel_under_the_interpreter(check: object) -> None:
    with backend("triton"):
        check("cpu")  # type: ignore[operator]


@needs_triton
def test_the_tail_of_a_large_vocabulary_under_the_interpreter() -> None:
    """One token of weight 1 and 184,621 of 1e-9: sums in fp32 would lose every one of them."""
    vocab, small = 184_622, 1e-9
    w = torch.full((vocab,), small)
    w[0] = 1.0
    tail = float(w[1].double()) * (vocab - 1)
    u = (1 + torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64) * tail) / (1 + tail)
    with backend("triton"):
        at = sample(w.expand(3, -1), u).double() / vocab
    torch.testing.assert_close(at, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), rtol=0, atol=1e-4)


@needs_triton
@pytest.mark.slow
def test_kernels_compile() -> None:
    in_a_process(__file__)


@pytest.mark.gpu
@pytest.mark.parametrize("check", [check_sample, check_ends, check_gumbel])
def test_kernel_on_a_gpu(check: object) -> None:
    check("cuda")  # type: ignore[operator]


if __name__ == "__main__":
    types = {n: "i32" for n in (*_sample.arg_names, *_sample_gumbel.arg_names)}
    types |= {n: "*i64" for n in ("out", "key", "images", "keys", "positions", "passes")}
    types |= {"weights": "*fp32", "u": "*fp64"}
    for vocab in (1000, 16384):  # 184,622 are walked over in the blocks of 16,384
        block, warps = tiles(vocab).values()
        compiled(_sample, types, dict(step=1, block=block), warps)
        compiled(_sample_gumbel, types, dict(step=1, purpose=3, turn_read=True, block=block), warps)
