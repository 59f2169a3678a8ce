"""Sampling with a MAR against published sampling, written again in the plainest way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.helpers.plain_mar import TINY, N, plain_bars, plain_pass, plain_tables, plain_times, random_weights, tiny
from visar.engine.denoising import Denoiser
from visar.engine.loop import decode
from visar.engine.rng import Noise
from visar.errors import VisarError
from visar.families.mar.denoising import DiffusionDenoiser
from visar.families.mar.diffusion import HeadNet, Schedule
from visar.families.mar.session import MARSession
from visar.families.mar.transformer import MAR
from visar.samplers.masked import ContinuousTarget, MaskedAutoregressive, NoiseBank, plan

T = 20


def plain_plan(length: int, passes: int) -> list[tuple[int, int]]:
    """How many tokens each pass decides, and how many guidance takes for decided after it, from the masks' sizes."""
    hidden, out = length, []
    for step in range(passes):
        after = max(1, min(hidden - 1, int(np.floor(length * np.cos(math.pi / 2.0 * (step + 1) / passes)))))
        out.append((hidden if step >= passes - 1 else hidden - after, length - after))
        hidden = after
    return out


def test_the_plan() -> None:
    for length in (1, 9, 256):
        for passes in range(1, length + 1):
            steps = plan(length, passes)
            assert steps == plain_plan(length, passes) and sum(n for n, _ in steps) == length
    counts = {k: [n for n, _ in plan(256, k)] for k in (8, 16, 32, 64, 256)}
    assert counts[256] == [1] * 256
    assert counts[64][:3] == [1, 1, 1] and set(counts[64][-4:]) == {6, 7}
    assert set(counts[32][-2:]) == {12, 13} and counts[16][-1] == 25 and counts[8][-1] == 49
    assert plan(256, 64)[-1][1] == 255
    for passes in (0, 10):
        with pytest.raises(VisarError, match=f"9 tokens are sampled in 1 to 9 passes, not {passes}"):
            plan(9, passes)


class GaussianNet(nn.Module):
    """A head whose tokens are of about unit size, as a random one's are not: N(m, 1), where m goes by what it sees."""

    def __init__(self, dim: int, condition: int):
        super().__init__()
        self.cond_embed = nn.Linear(condition, 2 * dim)
        self.input_proj = nn.Linear(dim, dim)
        self.time_embed = nn.Identity()
        self.register_buffer("bars", torch.from_numpy(plain_bars()).float())

    def forward(self, x: Tensor, times: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.at(x, times, z)

    def at(self, x: Tensor, times: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        bar = self.bars[times][:, None]
        m, place = self.cond_embed(z).tanh().chunk(2, -1)
        m = m + (self.input_proj(x) + times[:, None] / 500).sin()
        return (1 - bar).sqrt() * x - bar.sqrt() * m, place


def plain_sampling(
    mar: MAR, labels: Tensor, orders: Tensor, passes: int, cfg: float, schedule: str, temperature: float,
    first: Tensor, noise: Tensor,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Published sampling: masks and a doubled batch. Gives the tokens and the mask after each pass.

    `first` [B, N, d] and `noise` [B, N, T, d] are the noise of the places.
    """
    w, (b, n) = mar.state_dict(), orders.shape
    hidden, tokens, masks = torch.ones(b, n, dtype=torch.bool), torch.zeros(b, n, 3), []
    classes, null = w["class_emb.weight"][labels], w["fake_latent"].repeat(b, 1)
    for s in range(passes):
        halves = 1 if cfg == 1 else 2
        vectors = torch.cat([classes, null])[: halves * b]
        inputs = zip(tokens.repeat(halves, 1, 1), hidden.repeat(halves, 1), vectors, strict=True)
        z = torch.stack([plain_pass(w, t, m, v.repeat(TINY["buffer"], 1)) for t, m, v in inputs])
        length = int(np.floor(n * np.cos(math.pi / 2.0 * (s + 1) / passes)))
        length = max(1, min(int(hidden[0].sum()) - 1, length))
        after = torch.zeros(b, n, dtype=torch.bool).scatter(1, orders[:, :length], True)
        chosen = hidden if s == passes - 1 else hidden ^ after
        scale = 1 + (cfg - 1) * (n - length) / n if schedule == "linear" else cfg
        z = z[chosen.repeat(halves, 1)]
        x = first[chosen].repeat(halves, 1)
        own = noise[chosen].repeat(halves, 1, 1)
        for i, table in enumerate(plain_tables(noise.shape[2])):
            half = x[: len(x) // halves]
            eps, place = mar.diffloss.net(half.repeat(halves, 1), torch.full((len(x),), table["time"]), z)
            if halves == 2:
                with_it, without = eps.chunk(2)
                eps = (without + scale * (with_it - without)).repeat(2, 1)
            clean = (x - math.sqrt(1 - table["bar"]) * eps) / math.sqrt(table["bar"])
            share = (place + 1) / 2
            deviation = (share * math.log(table["beta"]) + (1 - share) * math.log(table["posterior"])).div(2).exp()
            x = table["clean"] * clean + table["noisy"] * x
            if table["time"] > 0:
                x = x + deviation * own[:, i] * temperature
        tokens[chosen] = x[: len(x) // halves]
        hidden = after
        masks.append(after if s < passes - 1 else torch.zeros_like(after))
    return tokens, masks


@pytest.mark.parametrize(
    ("cfg", "schedule", "temperature", "passes"),
    [(1.0, "linear", 0.9, 4), (3.0, "linear", 1.0, 4), (3.0, "constant", 1.0, 4), (2.0, "linear", 1.0, 9)],
)
def test_sampling(cfg: float, schedule: str, temperature: float, passes: int) -> None:
    """The same tokens from the same noise. A published order is decided from its end: ours is that order reversed."""
    mar = tiny()
    mar.diffloss.net = random_weights(GaussianNet(3, 16))
    orders = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    labels, noise = torch.tensor([4, 0, 2]), Noise(5, torch.arange(3))
    session = MARSession(mar, labels, orders.flip(1), cfg, schedule)
    sampler = MaskedAutoregressive(steps=passes, head_steps=T)
    decoded = decode(session, sampler, ContinuousTarget(temperature), noise)
    bank = NoiseBank.sample(
        noise,
        torch.arange(3).repeat_interleave(N),
        torch.arange(N).repeat(3),
        DiffusionDenoiser(mar.diffloss.net, Schedule(T), 3),
    )
    first, later = (t.unflatten(0, (3, N)) for t in (bank.start, bank.steps))
    tokens, masks = plain_sampling(mar, labels, orders, passes, cfg, schedule, temperature, first, later)
    for s, mask in enumerate(masks):
        assert torch.equal(decoded.commit_pass > s, mask)
    assert decoded.passes == passes
    assert 0.3 < tokens.std() < 10  # neither dead nor so large that the noise would not show
    assert torch.allclose(decoded.tokens, tokens, atol=2e-4)


def test_fewer_head_steps_towards_the_end() -> None:
    mar = tiny()
    session = MARSession(mar, torch.tensor([0]), torch.randperm(N)[None])
    decode(session, MaskedAutoregressive(5, 50, 5, latest=950), ContinuousTarget(), Noise(0, torch.arange(1)))
    counts = [5 + int((4 - s) / 4 * 45) for s in range(5)]
    assert counts == [50, 38, 27, 16, 5]
    assert [c.steps for c in session.denoisers[-5:]] == [len(plain_times(k, 950)) for k in counts]


def test_a_model_may_want_less_noisy_steps_alone() -> None:
    def times(latest: int, sampler: MaskedAutoregressive) -> list[int]:
        session = MARSession(tiny(latest=latest), torch.tensor([0]), torch.randperm(N)[None])
        decode(session, sampler, ContinuousTarget(), Noise(0, torch.arange(1)))
        return session.denoisers[0].times.tolist()

    assert times(999, MaskedAutoregressive(2, 10))[0] == 999 and times(900, MaskedAutoregressive(2, 10))[0] == 900
    assert times(900, MaskedAutoregressive(2, 10, latest=950))[0] == 950
    for wrong in (-1, 1000):
        with pytest.raises(VisarError, match="latest must be from 1 to 999"):
            MaskedAutoregressive(latest=wrong)


def test_drafts_in_closed_form_are_those_step_by_step() -> None:
    torch.manual_seed(0)
    denoiser = DiffusionDenoiser(HeadNet(3, 8, 16, 1), Schedule(30), 3, temperature=0.9)
    x, guess = torch.randn(5, 3), torch.randn(5, 6)
    steps = torch.tensor([0, 3, 11, 20, 21])[:, None] + torch.arange(8)
    normals = torch.randn(5, 8, 3)
    found, wanted = denoiser.draft(x, steps, guess, normals), Denoiser.draft(denoiser, x, steps, guess, normals)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == (5, 8, 3) and torch.allclose(a, b, atol=2e-6, rtol=1e-5)
    assert denoiser.draft(x, torch.full((5, 8), 29), guess, normals)[0].isfinite().all()  # behind the end, thrown away
