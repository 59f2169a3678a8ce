"""Target probabilities without a sort against a sort: extreme logits, ties, cuts, forced tokens, any length."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.compiled import compiled, in_a_process
from visar.kernels import target_probs as kernel
from visar.kernels.backend import backend, triton
from visar.kernels.target_probs import _guide, _target_probs, guide, target_probs, target_probs_torch

needs_triton = pytest.mark.skipif(triton is None, reason="torch brings Triton where it has GPU backends only")

NEAR = 2e-6  # how near to top_p rounding in fp32 may decide


def slow(x: np.ndarray, temperature: float, top_k: int, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """One distribution in float64 from the logits that fp32 gives, and the tokens where rounding may cut either way."""
    x = (x.astype(np.float32) / np.float32(temperature)).astype(np.float64)
    if 0 < top_k < len(x):
        x = np.where(x < np.sort(x)[-top_k], -np.inf, x)
    w = np.exp(x - x.max())
    p = w / w.sum()
    open_cut = np.zeros(len(p), bool)
    if top_p < 1:
        rank = p.astype(np.float32)  # what is equal in fp32 is cut in the order of the tokens
        order = np.lexsort((np.arange(len(p)), -rank.astype(np.float64)))
        before = np.cumsum(p[order]) - p[order]
        open_cut[order] = np.abs(before - top_p) < NEAR
        p[order[before > top_p]] = 0
        p /= p.sum()
    return p, open_cut


def same(got: Tensor, logits: Tensor, temperature: float, top_k: int, top_p: float, places: int | None = None) -> None:
    """Row by row, of all rows or the first few."""
    assert got.shape == logits.shape and got.dtype == torch.float32
    for own, x in list(zip(got.flatten(0, -2), logits.flatten(0, -2), strict=True))[:places]:
        expected, open_cut = slow(x.float().cpu().numpy(), temperature, top_k, top_p)
        p = own.double().cpu().numpy()
        settings = (len(p), temperature, top_k, top_p)
        if open_cut.any():
            assert abs(p.sum() - 1) < 1e-5 and ((p > 0) == (expected > 0))[~open_cut].all(), settings
        else:
            assert ((p > 0) == (expected.astype(np.float32) > 0))[(expected > 1e-37) | (expected == 0)].all(), settings
            np.testing.assert_allclose(p, expected, rtol=3e-5, atol=1e-7, err_msg=str(settings))


def random(vocab: int, seed: int = 0) -> Tensor:
    """Logits [2, 2, V]: two rows of random numbers, one of round ones, with many ties, one of equal ones."""
    x = torch.randn(2, 2, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    x[1, 0] = x[1, 0].round()
    x[1, 1] = -2.5
    return x


SETTINGS = [(1.0, 0, 1.0), (0.7, 3, 1.0), (1.3, 0, 0.9), (1.0, 40, 0.8), (0.5, 1, 0.5), (2.0, 900, 0.3), (1.0, 0, 1e-4)]


def check_settings(device: str) -> None:
    for vocab in (2, 7, 1000, 2048) if device != "cpu" else (2, 300):
        for temperature, top_k, top_p in SETTINGS:
            x = random(vocab).to(device)
            same(target_probs(x, temperature, top_k, top_p), x, temperature, top_k, top_p)
    for top_k in (7, 8, 100):  # as many as there are, and more
        x = random(7).to(device)
        same(target_probs(x, 1.0, top_k), x, 1.0, 0, 1.0)
    x = random(300).to(device)
    assert (target_probs(x, top_p=1 - 1e-9) > 0).sum() > 0.99 * x.numel()  # nothing that matters is dropped
    half = random(300).bfloat16().to(device)
    assert torch.equal(target_probs(half, 0.9, 20, 0.8), target_probs(half.float(), 0.9, 20, 0.8))
    view = random(300).to(device)[:, :, 3:203]
    assert torch.equal(target_probs(view[:, 1:], 0.9, 20, 0.8), target_probs(view[:, 1:].contiguous(), 0.9, 20, 0.8))


def check_extremes(device: str) -> None:
    inf = math.inf
    rows = [
        [1e4, -1e4, 0.0, 1e4, 9999.0, -inf],
        [-inf, -inf, 3.0, -inf, -inf, -inf],
        [-1e4, -1e4, -1e4, -1e4, -inf, -1e4],
        [0.0, -0.0, 0.0, -0.0, -1.0, 1e-45],
        [1e38, 1e38, -1e38, 0.0, 0.0, 0.0],
        [-3e38, -inf, -1e38, -2e38, -3e38, -3e38],
    ]
    x = torch.tensor(rows, device=device)[None]
    for top_k in (0, 1, 2, 5):
        for top_p in (1.0, 0.9, 0.4):
            same(target_probs(x, 1.0, top_k, top_p), x, 1.0, top_k, top_p)
    ties = target_probs(
        torch.zeros(1, 1, 100, device=device), 1.0, 0, 0.305
    )  # equal ones are cut in the order of the tokens
    kept = int((ties > 0).sum())
    assert kept == 31 and (ties[0, 0, :kept] > 0).all()
    exactly = target_probs(torch.zeros(1, 1, 4, device=device), 1.0, 0, 0.5)  # reaching top_p is not passing it
    assert exactly.tolist() == [[pytest.approx([1 / 3, 1 / 3, 1 / 3, 0.0])]]


def check_forced(device: str) -> None:
    x = random(50).to(device)
    forced = torch.tensor([[-1, 3], [49, 0]], device=device)
    p, free = target_probs(x, 0.8, 10, 0.9, forced), target_probs(x, 0.8, 10, 0.9)
    point = torch.eye(50, device=device)
    assert torch.equal(p, torch.stack([torch.stack([free[0, 0], point[3]]), point[[49, 0]]]))
    wide = torch.full((2, 5), -1, device=device)
    assert torch.equal(target_probs(x, 0.8, 10, 0.9, wide[:, 1:3]), free)


def check_guidance(device: str) -> None:
    g = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16):
        halves = (torch.randn(4, 3, 70, generator=g) * 4).to(dtype).to(device)
        c, u = halves.chunk(2)
        flags = torch.tensor([[True, False, True], [False, False, True]], device=device)
        for scale in (0.0, 7.5):
            for guided in (None, flags, flags[:, :1].expand(-1, 3)):
                both = (1 - scale) * u.double() + scale * c.double()
                expected = both if guided is None else torch.where(guided[..., None], both, c.double())
                got = guide(c, u, scale, guided)
                torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-5)
                if guided is not None:
                    assert got.dtype == torch.float32 and torch.equal(got[~guided], c.float()[~guided])
    c, u = (torch.randn(2, 3, 40, generator=g) * 4).to(device).split(1)
    part = guide(c[:, 1:], u[:, 1:], 2.0)
    assert torch.equal(part, guide(c, u, 2.0)[:, 1:])


def check_places(device: str) -> None:
    """Bit for bit, wherever a row stands."""
    row = random(100, seed=2)[1, 0].to(device)
    other = random(100, seed=3).to(device)
    alone = target_probs(row.view(1, 1, -1), 0.9, 9, 0.7)[0, 0]
    for b in range(2):
        for k in range(2):
            x = other.clone()
            x[b, k] = row
            assert torch.equal(target_probs(x, 0.9, 9, 0.7)[b, k], alone)


def check_rows(device: str) -> None:
    """Settings of each row's own: bit for bit what a call with these alone gives."""
    settings = [*SETTINGS, (1.0, 0, 1.0), (0.9, 500, 1.0)]
    x = random(300).to(device)[:1].expand(len(settings), -1, -1)
    temperature, top_k, top_p = (torch.tensor(values, device=device) for values in zip(*settings, strict=True))
    together, uncut = target_probs(x, temperature, top_k, top_p), target_probs(x, temperature)
    for b, each in enumerate(settings):
        assert torch.equal(together[b : b + 1], target_probs(x[b : b + 1], *each))
        assert torch.equal(uncut[b : b + 1], target_probs(x[b : b + 1], each[0]))
    c, u = torch.randn(2, 3, 2, 70, generator=torch.Generator().manual_seed(1)).to(device)
    scales = torch.tensor([0.0, 1.3, 7.5], device=device)
    for b, scale in enumerate((0.0, 1.3, 7.5)):
        assert torch.equal(guide(c, u, scales)[b : b + 1], guide(c[b : b + 1], u[b : b + 1], scale))


CHECKS = [check_settings, check_extremes, check_forced, check_guidance, check_places, check_rows]


@pytest.mark.parametrize("check", CHECKS)
def test_plain_form(check: Callable[[str], None]) -> None:
    with backend("torch"):
        check("cpu")


@needs_triton
@pytest.mark.parametrize("check", CHECKS)
def test_kernel_under_the_interpreter(check: Callable[[str], None]) -> None:
    with backend("triton"):
        check("cpu")


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("check", [check_extremes, check_forced, check_guidance, check_places])
def test_kernel_in_blocks_under_the_interpreter(check: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is longer than a program's registers is read again and again; here, all of it."""
    monkeypatch.setattr(kernel, "RESIDENT", 0)
    monkeypatch.setattr(kernel, "BLOCK", 16)
    with backend("triton"):
        check("cpu")


@needs_triton
@pytest.mark.parametrize("vocab", [16384, 16387])
def test_large_rows_under_the_interpreter(vocab: int) -> None:
    x = random(vocab)[1:]
    with backend("triton"):
        same(target_probs(x, 1.0, 2000, 0.95), x, 1.0, 2000, 0.95)
        forced = torch.tensor([[-1, vocab - 1]])
        assert target_probs(x, forced=forced)[0, 1].nonzero().tolist() == [[vocab - 1]]


@needs_triton
def test_gradients_take_the_plain_form() -> None:
    x = random(20).requires_grad_()
    with backend("triton"):
        target_probs(x, 0.9, 5)[0, 0].amax().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0
        assert guide(x, x * 2, 3.0).requires_grad
        with torch.no_grad():
            torch.testing.assert_close(target_probs(x, 0.9, 5), target_probs_torch(x, 0.9, 5))


@needs_triton
@pytest.mark.slow
def test_kernels_compile() -> None:
    in_a_process(__file__)


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_kernel_on_a_gpu(check: Callable[[str], None]) -> None:
    check("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [16384, 16387, 184_622])
def test_large_rows_on_a_gpu(vocab: int) -> None:
    x = random(vocab).cuda()
    for settings in ((1.0, 2000, 1.0), (1.0, 0, 0.9), (0.8, 5000, 0.95)):
        same(target_probs(x, *settings), x, *settings)


if __name__ == "__main__":
    types = {n: "i32" for n in (*_target_probs.arg_names, *_guide.arg_names)} | {"out": "*fp32", "guided": "*i1"}
    types |= {"forced": "*i64", "scale": "fp32", "temperature": "fp32", "top_p": "fp32"}
    for dtype in ("*fp32", "*bf16"):
        types |= {"cond": dtype, "uncond": dtype, "logits": dtype}
        compiled(_guide, types, dict(by_row=False, some=True, block=1024))
    of_rows = {"scale": "*fp32", "temperature": "*fp32", "top_p": "*fp32", "top_k": "*i64"}
    compiled(_guide, types | of_rows, dict(by_row=True, some=True, block=1024))
    shared = dict(own_temperature=False, own_top_k=False, own_top_p=False)
    every = dict(by_count=True, by_mass=True, certain=True) | shared
    one = dict(by_count=True, by_mass=False, certain=False) | shared
    own = dict(own_temperature=True, own_top_k=True, own_top_p=True, by_count=True, by_mass=True, certain=True)
    compiled(_target_probs, types | of_rows, own | dict(whole=True, block=2048), 16)
    for whole, block in ((True, 16384), (False, kernel.BLOCK)):  # 16,384 and 184,622 tokens
        for constants in (every, one):
            compiled(_target_probs, types, constants | dict(whole=whole, block=block), 16)
