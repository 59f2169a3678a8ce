"""MAR's networks and schedule against `plain_mar`, which writes them again."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.helpers.plain_mar import TINY, N, drawn, linear, norm, normed, plain_pass, plain_tables, random_weights, tiny
from tests.helpers.published import mar_arguments
from visar.errors import VisarError
from visar.families.mar.denoising import DiffusionDenoiser
from visar.families.mar.diffusion import HeadNet, Schedule, alphas_bar, interpolated_log_variance
from visar.families.mar.session import MARSession
from visar.families.mar.specs import MAR_MODELS
from visar.families.mar.transformer import MAR, Block


@pytest.mark.parametrize(("name", "keys"), [("mar-b", 364), ("mar-l", 476), ("mar-h", 604)])
def test_published_sizes(name: str, keys: int) -> None:
    with torch.device("meta"):
        state = MAR(**mar_arguments(MAR_MODELS[name])).state_dict()
    assert (sum(t.numel() for t in state.values()), len(state)) == (MAR_MODELS[name].parameters, keys)


def test_a_block_is_that_of_timm() -> None:
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    theirs = vision_transformer.Block(24, 3, 4, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6)).eval()
    ours = random_weights(Block(24, 3))
    theirs.load_state_dict(ours.state_dict())
    x = drawn(2, 7, 24)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


COUNTS = {"nothing known": [0, 0, 0], "all alike": [4, 4, 4], "ragged": [0, 5, 2], "all but one": [8, 8, 8]}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_a_pass(counts: list[int]) -> None:
    """Rows that know fewer tokens are padded, with places that hold anything; each is as if it were alone."""
    mar = tiny().to(torch.float64)
    w, most = mar.state_dict(), max(counts)
    tokens = drawn(3, N, 3, dtype=torch.float64) * 3
    order = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    slots = torch.cat([mar.slots(torch.tensor([4, 1])), mar.null_slots(1)])
    valid = torch.arange(most) < torch.tensor(counts)[:, None]
    z = mar(tokens, order[:, :most], slots, None if len(set(counts)) == 1 else valid)
    vectors = (w["class_emb.weight"][4], w["class_emb.weight"][1], w["fake_latent"][0])
    for b, vector in enumerate(vectors):
        hidden = torch.ones(N, dtype=torch.bool)
        hidden[order[b, : counts[b]]] = False
        assert torch.allclose(z[b], plain_pass(w, tokens[b], hidden, vector.repeat(TINY["buffer"], 1)), atol=1e-9)


def test_captions_fill_the_slots_one_by_one() -> None:
    mar = tiny(condition="text", caption_features=6).to(torch.float64)
    w, features = mar.state_dict(), drawn(1, 4, 6, dtype=torch.float64)
    z = mar(torch.zeros(1, N, 3), torch.zeros(1, 0, dtype=torch.long), mar.slots(features))
    slots = linear(features[0], w, "caption_proj")
    assert torch.allclose(z[0], plain_pass(w, torch.zeros(N, 3).double(), torch.ones(N) > 0, slots), atol=1e-9)


def test_the_head_net() -> None:
    net = random_weights(HeadNet(3, 16, 24, 2)).double()
    x, z, times = drawn(4, 3, dtype=torch.float64), drawn(4, 16, dtype=torch.float64), torch.tensor([0, 10, 501, 999])
    w = net.state_dict()
    angles = times.double()[:, None] * 10000 ** (-torch.arange(128).double() / 128)

    def silu(t: Tensor) -> Tensor:
        return t / (1 + torch.exp(-t))

    hidden = silu(linear(torch.cat([angles.cos(), angles.sin()], -1), w, "time_embed.mlp.0"))
    y = linear(hidden, w, "time_embed.mlp.2") + linear(z, w, "cond_embed")
    h = linear(x, w, "input_proj")
    for i in range(2):
        shift, scale, gate = linear(silu(y), w, f"res_blocks.{i}.adaLN_modulation.1").split(24, -1)
        inner = norm(h, w, f"res_blocks.{i}.in_ln") * (1 + scale) + shift
        h = h + gate * linear(silu(linear(inner, w, f"res_blocks.{i}.mlp.0")), w, f"res_blocks.{i}.mlp.2")
    shift, scale = linear(silu(y), w, "final_layer.adaLN_modulation.1").split(24, -1)
    out = linear(normed(h) * (1 + scale) + shift, w, "final_layer.linear")
    # Angles are of fp32, as published: at step 999 they are off by up to 6e-5.
    for ours, wanted in zip(net(x, times, z), out.split(3, -1), strict=True):
        assert (ours - wanted).abs().max() < 1e-3 * wanted.abs().max()


@pytest.mark.parametrize(
    ("steps", "latest"), [(2, 999), (5, 999), (20, 999), (43, 999), (100, 999), (1000, 999), (50, 950)]
)
def test_the_schedule(steps: int, latest: int) -> None:
    """With 43 steps two of them lie half way between training steps, where the order of rounding shows."""
    schedule, tables = Schedule(steps, latest), plain_tables(steps, latest)
    assert schedule.times.tolist() == [t["time"] for t in tables] and schedule.steps == len(tables)

    def same(ours: Tensor, wanted: list[float]) -> None:
        np.testing.assert_allclose(ours.numpy(), wanted, rtol=1e-8, atol=1e-10)

    same(schedule.root, [math.sqrt(t["bar"]) for t in tables])
    same(schedule.spread, [math.sqrt(1 / t["bar"] - 1) for t in tables])
    same(schedule.from_clean, [t["clean"] for t in tables])
    same(schedule.from_noisy, [t["noisy"] for t in tables])
    same(schedule.log_most, [math.log(t["beta"]) for t in tables])
    same(schedule.log_least, [math.log(t["posterior"]) for t in tables])


def test_known_numbers_of_the_schedule() -> None:
    assert float(alphas_bar()[-1]) == pytest.approx(2.4e-9, rel=0.02)
    s = Schedule()
    bounds = {0: (0.00624, 0.00643), 1: (0.0062, 0.0261), 50: (0.1818, 0.1849), 99: (0.9999, 1.0)}
    for index, (least, most) in bounds.items():
        found = [float((table[99 - index] / 2).exp()) for table in (s.log_least, s.log_most)]
        assert found == pytest.approx([least, most], abs=6e-5)
    for steps, gain in {100: 316, 50: 632, 20: 1674, 5: 7707}.items():
        s = Schedule(steps)
        assert float(s.from_clean[0] * s.spread[0]) == pytest.approx(gain, abs=0.5)
    fewer = Schedule(50, 950)
    assert fewer.steps == 48 and fewer.times[0] == 950 and fewer.times[-1] == 0
    for steps in (1, 1001):
        with pytest.raises(VisarError, match=f"2 to 1000 steps, not {steps}"):
            Schedule(steps)


R, T = 40, 20


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("last_noise", [False, True])
def test_the_chain(guided: bool, last_noise: bool) -> None:
    """Guidance is of the noise alone; the variance is that of the conditional half, in the space of logarithms."""
    net = HeadNet(3, 16, 24, 2)
    random_weights(net)
    denoiser = DiffusionDenoiser(net, Schedule(T), 3, temperature=0.7, last_noise=last_noise)
    x, step, c, u = drawn(R, 3), torch.arange(R) % T, drawn(R, 16, seed=2), drawn(R, 16, seed=3)
    scale = torch.linspace(0.5, 4, R)[:, None]
    guess = denoiser.evaluate(x, step, torch.cat([c, u, scale], -1) if guided else c)
    mean, std = denoiser.kernel(x, step, guess)
    assert (denoiser.calls, denoiser.evaluations) == (1, R)
    row = {key: torch.tensor([plain_tables(T)[i][key] for i in step])[:, None] for key in plain_tables(T)[0]}
    noise, place = net(x, row["time"][:, 0], c)
    if guided:
        without, _ = net(x, row["time"][:, 0], u)
        noise = without + scale * (noise - without)
    clean = (x - (1 - row["bar"]).sqrt() * noise) / row["bar"].sqrt()
    share = (place + 1) / 2
    spread = 0.7 * (share * row["beta"].log() + (1 - share) * row["posterior"].log()).div(2).exp()
    if not last_noise:
        spread[step == T - 1] = 0
    assert torch.allclose(guess, torch.cat([clean, place], -1), rtol=1e-4, atol=1e-4)
    assert torch.allclose(mean, row["clean"] * clean + row["noisy"] * x, rtol=1e-4, atol=1e-4)
    assert torch.allclose(std, spread, rtol=1e-4)
    known = interpolated_log_variance(denoiser.schedule, step, place)
    assert torch.allclose((known / 2).exp()[step < T - 1] * 0.7, spread[step < T - 1], rtol=1e-4)


def test_the_head_is_never_rounded() -> None:
    """In bf16 and back it would be of fp32 again, and wrong in the third digit."""
    mar = tiny()
    keys, head = list(mar.state_dict()), {k: t.clone() for k, t in mar.diffloss.state_dict().items()}
    assert mar.to(torch.bfloat16) is mar and list(mar.state_dict()) == keys
    assert {t.dtype for k, t in mar.state_dict().items() if not k.startswith("diffloss.")} == {torch.bfloat16}
    kept = mar.diffloss.state_dict()
    assert all(kept[k].dtype == torch.float32 and torch.equal(kept[k], head[k]) for k in head)
    order = torch.randperm(N)[None]
    session = MARSession(mar, torch.tensor([1]), order, 2.0)
    condition = session.context(session.start, torch.tensor([0]), order[:, :4], order[:, 4:], torch.full((1, 5), 5))
    x = torch.zeros(5, 3)
    guess = session.denoiser(5).evaluate(x, torch.arange(5), condition[0])
    assert condition.dtype == guess.dtype == torch.float32 and bool(guess.isfinite().all())
    mar.diffloss.bfloat16()
    with pytest.raises(VisarError, match="must be in float32, not bfloat16"):
        session.denoiser(5)
