"""The fused verification against the rules of `visar.samplers.verification`, token for token on the same uniforms."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch
from torch import Tensor

from tests.helpers.compiled import compiled, in_a_process
from visar.kernels.backend import backend, triton
from visar.kernels.noise import ExponentialNoise
from visar.kernels.sample import tiles
from visar.kernels.verify import _verify
from visar.samplers.jacobi import RULES
from visar.samplers.verification import StepNoise, Verified, sample

needs_triton = pytest.mark.skipif(triton is None, reason="torch brings Triton where it has GPU backends only")


def draft_probs(batch: int, columns: int, vocab: int, g: torch.Generator) -> Tensor:
    w = torch.rand(batch, columns, vocab, generator=g) ** 3
    w[torch.rand(w.shape, generator=g) < 0.3] = 0
    w[..., vocab // 2] += 0.01
    return w / w.sum(-1, keepdim=True)


def noise(batch: int, window: int, vocab: int, g: torch.Generator, device: str) -> StepNoise:
    """Uniforms that are columns of something wider, as in a step, and a exponential noise that is not made."""
    u = torch.rand(2, batch, 2 * window, generator=g, dtype=torch.float64).to(device)
    images = torch.arange(batch, device=device)
    at = (torch.arange(window) + torch.randint(0, 200, (batch, 1), generator=g)).to(device)
    exponential = ExponentialNoise(torch.tensor([[8, 9]], device=device), images, 3 * images, at, 0, 3, vocab)
    return StepNoise(u[0, :, :window], u[1, :, :window], exponential)


def both(rule: str, p: Tensor, q: Tensor, drafts: Tensor, c: StepNoise) -> tuple[Verified, Verified]:
    assert isinstance(c.exponential, ExponentialNoise)
    with backend("triton"):
        got = RULES[rule](p, q, drafts, c)
        made = c._replace(exponential=c.exponential.make())  # the same numbers: another logarithm may round another way
    with backend("torch"):
        return RULES[rule](p, q, drafts, made), got


def check_rules(
    device: str, batch: int, window: int, vocab: int, seed: int, rules: Collection[str] = tuple(RULES)
) -> Tensor:
    """Rules on random distributions, some of them equal. How many drafts stood, of all."""
    g = torch.Generator().manual_seed(seed)
    p, c = draft_probs(batch, window, vocab, g), noise(batch, window, vocab, g, device)
    q = draft_probs(batch, window - 1, vocab, g)
    same = torch.rand(batch, window - 1, generator=g) < 0.4
    q[same] = p[:, :-1][same]
    drafts = sample(q, torch.rand(batch, window - 1, generator=g, dtype=torch.float64))
    inputs = torch.cat([drafts[:, :1], drafts], dim=1).to(device)  # the drafts are columns behind the first
    stood = []
    for rule in rules:
        expected, got = both(rule, p.to(device), q.to(device), inputs[:, 1:], c)
        assert torch.equal(got.accepted, expected.accepted), (rule, batch, window, vocab)
        assert torch.equal(got.tokens, expected.tokens), (rule, batch, window, vocab)
        stood.append(got.accepted)
    return torch.cat(stood)


def check_many(device: str) -> None:
    shapes = [(6, 2, 2), (3, 5, 7), (2, 7, 1000), (1, 3, 2048), (1, 2, 16387)]
    stood = torch.cat([check_rules(device, *shape, seed) for seed, shape in enumerate(shapes, 10)]).unique()
    assert len(stood) >= 3 and stood[0] == 0


def check_edges(device: str) -> None:
    g = torch.Generator().manual_seed(9)
    p, c = draft_probs(2, 3, 40, g).to(device), noise(2, 3, 40, g, device)
    # A uniform distribution is one number; a distribution of one position may serve all.
    flat = torch.full((), 1 / 40, device=device).expand(2, 2, 40)
    left = p[:, :1].expand(-1, 2, -1)
    # Equal distributions keep what was sampled from them; a residual that is next to nothing gives way to p.
    near = (p[:, :-1] - 1e-9).clamp_min(0)
    far = torch.zeros_like(flat).index_fill(2, torch.tensor([39], device=device), 1.0)
    high = c._replace(accept=torch.full_like(c.accept, 1 - 2.0**-53))
    for q, used in ((flat, c), (left, c), (p[:, :-1], c), (p[:, :-1], high), (near, high), (far, c)):
        drafts = sample(q, torch.rand(2, 2, generator=g, dtype=torch.float64).to(device))
        for rule in RULES:
            expected, got = both(rule, p, q, drafts, used)
            assert torch.equal(got.tokens, expected.tokens) and torch.equal(got.accepted, expected.accepted)
            if q.data_ptr() == p.data_ptr() and q.stride() == p.stride():
                assert (got.accepted == 2).all() and torch.equal(got.tokens[:, :-1], drafts)
    # A draft that p gives nothing is rejected by every uniform, although nothing is left of p - q.
    point = torch.eye(4, device=device)[torch.tensor([[1, 2]])].to(device)
    drafts, low = torch.tensor([[3]], device=device), noise(1, 2, 4, g, device)
    for rule in RULES:
        expected, got = both(rule, point, point[:, :1], drafts, low)
        assert got.accepted.tolist() == [0] and torch.equal(got.tokens, expected.tokens)


@needs_triton
def test_rules_under_the_interpreter() -> None:
    check_many("cpu")


@needs_triton
def test_edges_under_the_interpreter() -> None:
    check_edges("cpu")


@pytest.mark.slow
@needs_triton
def test_the_widest_window_under_the_interpreter() -> None:
    check_rules("cpu", 1, 128, 5, seed=1, rules=["maximal"])
    check_rules("cpu", 1, 70, 3, seed=2, rules=["independent"])


@needs_triton
def test_a_wider_window_and_noise_that_is_made_take_the_plain_rules(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("the fused form was called")

    monkeypatch.setattr("visar.samplers.verification.verify_triton", fail)
    g = torch.Generator().manual_seed(3)
    for window, made in ((129, False), (3, True)):
        p, c = draft_probs(1, window, 4, g), noise(1, window, 4, g, "cpu")
        q, drafts = p[:, :-1], torch.full((1, window - 1), 2)
        if made:
            assert isinstance(c.exponential, ExponentialNoise)
            c = c._replace(exponential=c.exponential.make())
        with backend("triton"):
            assert RULES["gumbel"](p, q, drafts, c).accepted.tolist() == [window - 1]


@needs_triton
@pytest.mark.slow
def test_kernel_compiles() -> None:
    in_a_process(__file__)


@pytest.mark.gpu
def test_rules_on_a_gpu() -> None:
    check_many("cuda")
    check_edges("cuda")
    check_rules("cuda", 2, 128, 16384, seed=1)


if __name__ == "__main__":
    types = {n: "i32" for n in _verify.arg_names} | {n: "*fp64" for n in ("accept", "sample")}
    types |= {n: "*i64" for n in ("tokens", "accepted", "drafts", "key", "images", "keys", "positions", "passes")}
    types |= {"p": "*fp32", "q": "*fp32", "equal": "fp32"}
    block, warps = tiles(16384).values()  # 184,622 are walked over in the same blocks
    constants = dict(p_step=1, q_step=1, purpose=3, turn_read=True, columns=64, block=block)
    for rule in RULES:
        compiled(_verify, types, constants | dict(rule=rule), warps)
