"""LANTERN's pooling against one neighbour after the other in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers.compiled import compiled, in_a_process
from visar.kernels.aggregate import _pool, pool
from visar.kernels.backend import backend, triton

needs_triton = pytest.mark.skipif(triton is None, reason="torch brings Triton where it has GPU backends only")


def slow(r: list[float], y: int, near: list[int], budget: float, share: float) -> tuple[float, list[float]]:
    moved, gain = list(r), 0.0
    for token in near:
        if gain + r[token] > budget + share * r[y]:
            break
        gain += r[token]
        moved[token] = 0.0
    moved[y] += gain
    return gain, moved


def case(batch: int, vocab: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Distributions, a third of whose entries are zero, tokens, and a table in which no token is its own neighbour."""
    g = torch.Generator().manual_seed(vocab + k)
    r = torch.rand(batch, vocab, generator=g) ** 3 * (torch.rand(batch, vocab, generator=g) > 0.3)
    r[:, 0] += 1e-3
    table = torch.stack([torch.randperm(vocab - 1, generator=g)[:k] for _ in range(vocab)])
    table += table >= torch.arange(vocab)[:, None]
    y = torch.randint(0, vocab, (batch,), generator=g)
    y[0] = vocab - 1
    return r / r.sum(-1, keepdim=True), y, table


def check(device: str) -> None:
    for batch, vocab, k in ((3, 2, 1), (4, 7, 6), (3, 300, 10), (2, 2000, 1500), (2, 4500, 40)):
        r, y, table = case(batch, vocab, k)
        on = [x.to(device) for x in (r, y, table)]
        partial = 0
        for budget, share in ((0.0, 0.0), (0.1, 0.0), (0.0, 1.0), (0.0, 7.0), (0.3, 0.5), (2.0, 0.0)):
            gain, moved = (x.cpu() for x in pool(*on, budget, share))
            expected = [slow(*row, budget, share) for row in zip(*(x.tolist() for x in (r, y, table[y])), strict=True)]
            assert gain.dtype == torch.float64 and moved.dtype == torch.float32
            torch.testing.assert_close(gain, torch.tensor([e[0] for e in expected]).double(), rtol=1e-6, atol=1e-15)
            given = torch.tensor([e[1] for e in expected])
            torch.testing.assert_close(moved, given, rtol=1e-6, atol=1e-9)
            assert torch.equal(moved == 0, given == 0)
            torch.testing.assert_close(moved.sum(-1), r.sum(-1))
            everything = r.gather(1, table[y]).double().sum(-1)
            partial += int(((gain > 0) & (gain < everything * 0.99)).sum())
        assert partial > 0 or k == 1
    # A distribution that is a view, and the budget at which a mass is just within it, which fp32 would miss.
    r, y, table = (x.to(device) for x in case(4, 50, 9))
    wide = torch.stack([r, r + 1], 1)
    assert all(map(torch.equal, pool(wide[:, 0], y, table, 0.2, 0.0), pool(r, y, table, 0.2, 0.0)))
    masses = r.cpu().double().gather(1, table[y].cpu())
    for row in range(4):
        edge = float(masses[row, 0])
        one = (r[row : row + 1], y[row : row + 1], table)
        if edge > 0:
            assert pool(*one, edge * (1 - 2.0**-50), 0.0)[0].item() == 0.0
            assert pool(*one, edge, 0.0)[0].item() >= edge


def test_plain_form() -> None:
    with backend("torch"):
        check("cpu")


@needs_triton
def test_kernel_under_the_interpreter() -> None:
    with backend("triton"):
        check("cpu")


@needs_triton
@pytest.mark.slow
def test_kernel_compiles() -> None:
    in_a_process(__file__)


@pytest.mark.gpu
def test_kernel_on_a_gpu() -> None:
    with backend("triton"):
        check("cuda")


if __name__ == "__main__":
    types = {n: "i32" for n in _pool.arg_names} | {n: "*fp32" for n in ("moved", "r")} | {"gain": "*fp64"}
    types |= {"tokens": "*i64", "table": "*i64", "budget": "i64", "share": "i64"}
    for block in (16, 1024):
        compiled(_pool, types, dict(part=4096, block=block))
