"""MAR against its paper and published code, written again here in the plainest way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from visar.engine.chain import Chain, DiffusionChain
from visar.engine.loop import decode
from visar.engine.mar_session import MARSession
from visar.engine.rng import Noise
from visar.errors import VisarError
from visar.models.diffusion import HeadNet, Schedule, alphas_bar, interpolated_log_variance
from visar.models.mar import MAR, Block
from visar.models.specs import MAR_MODELS, mar_arguments
from visar.samplers.masked import ContinuousTarget, MaskedAutoregressive, NoiseBank, plan

TINY: dict[str, Any] = dict(
    token_dim=3, grid=3, dim=16, encoder_layers=2, decoder_layers=3, num_heads=2, head_width=24, head_layers=2,
    classes=5, buffer=4,
)  # fmt: skip
N = TINY["grid"] ** 2
Weights = Mapping[str, Tensor]


def random_weights(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, so that none of them is neutral, as norms are at first."""
    g = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.3, generator=g)
    return module.requires_grad_(False).eval()


def tiny(**sizes: Any) -> MAR:
    mar = MAR(**TINY | sizes)
    random_weights(mar)
    return mar


def drawn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def normed(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def norm(x: Tensor, w: Weights, name: str) -> Tensor:
    return normed(x) * w[f"{name}.weight"] + w[f"{name}.bias"]


def plain_block(x: Tensor, w: Weights, name: str, heads: int) -> Tensor:
    """A transformer block on one sequence [L, C], head by head."""
    size = x.shape[-1] // heads
    q, k, v = linear(norm(x, w, f"{name}.norm1"), w, f"{name}.attn.qkv").chunk(3, -1)
    out = []
    for part in (slice(i * size, (i + 1) * size) for i in range(heads)):
        out.append((q[:, part] @ k[:, part].T / math.sqrt(size)).softmax(-1) @ v[:, part])
    x = x + linear(torch.cat(out, -1), w, f"{name}.attn.proj")
    h = linear(norm(x, w, f"{name}.norm2"), w, f"{name}.mlp.fc1")
    return x + linear(h * 0.5 * (1 + torch.erf(h / math.sqrt(2))), w, f"{name}.mlp.fc2")


def plain_pass(w: Weights, tokens: Tensor, hidden: Tensor, slots: Tensor) -> Tensor:
    """The vectors [N, C] of one picture: tokens [N, d], a mask of the hidden ones [N], what its slots hold [M, C]."""
    m, heads = len(slots), TINY["num_heads"]
    h = torch.cat([slots, linear(tokens, w, "z_proj")]) + w["encoder_pos_embed_learned"][0]
    kept = torch.cat([torch.ones(m, dtype=torch.bool), ~hidden])
    h = norm(h, w, "z_proj_ln")[kept]
    for i in range(TINY["encoder_layers"]):
        h = plain_block(h, w, f"encoder_blocks.{i}", heads)
    h = linear(norm(h, w, "encoder_norm"), w, "decoder_embed")
    full = w["mask_token"][0].repeat(len(kept), 1)
    full[kept] = h
    full = full + w["decoder_pos_embed_learned"][0]
    for i in range(TINY["decoder_layers"]):
        full = plain_block(full, w, f"decoder_blocks.{i}", heads)
    return norm(full, w, "decoder_norm")[m:] + w["diffusion_pos_embed_learned"][0]


def plain_times(steps: int, latest: int = 999) -> list[int]:
    """The training steps in rising order, added up as published code does."""
    at, out = 0.0, set()
    for _ in range(steps):
        out.add(min(round(at), latest))
        at += 999 / (steps - 1)
    return sorted(out)


def plain_bars() -> np.ndarray:
    """The cosine schedule in closed form; its last step alone is clipped."""
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    bars = f[1:] / f[0]
    bars[-1] = bars[-2] * (1 - 0.999)
    return bars


def plain_tables(steps: int, latest: int = 999) -> list[dict[str, float]]:
    """For each step, the noisiest first: what Bayes' rule says of the token before it.

    The token before is N(sqrt(before) clean, 1 - before), and x given it N(sqrt(alpha) it, beta); the posterior is
    their product, added up by precision.
    """
    out, before = [], 1.0
    for t in plain_times(steps, latest):
        bar = float(plain_bars()[t])
        alpha = bar / before
        beta = 1 - alpha
        if before == 1:
            mean, variance = (1.0, 0.0), 0.0
        else:
            precision = 1 / (1 - before) + alpha / beta
            mean = (math.sqrt(before) / (1 - before) / precision, math.sqrt(alpha) / beta / precision)
            variance = 1 / precision
        out.append({"time": t, "bar": bar, "clean": mean[0], "noisy": mean[1], "beta": beta, "posterior": variance})
        before = bar
    out[0]["posterior"] = out[1]["posterior"]  # its logarithm is asked for, so published code puts the next one there
    return out[::-1]


@pytest.mark.parametrize(
    ("name", "elements", "keys"),
    [("mar-b", 207_924_768, 364), ("mar-l", 478_326_304, 476), ("mar-h", 942_403_104, 604)],
)
def test_published_sizes(name: str, elements: int, keys: int) -> None:
    with torch.device("meta"):
        state = MAR(**mar_arguments(MAR_MODELS[name])).state_dict()
    assert (sum(t.numel() for t in state.values()), len(state)) == (elements, keys)


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
    chain = DiffusionChain(net, Schedule(T), 3, temperature=0.7, last_noise=last_noise)
    x, step, c, u = drawn(R, 3), torch.arange(R) % T, drawn(R, 16, seed=2), drawn(R, 16, seed=3)
    scale = torch.linspace(0.5, 4, R)[:, None]
    guess = chain.evaluate(x, step, torch.cat([c, u, scale], -1) if guided else c)
    mean, std = chain.kernel(x, step, guess)
    assert (chain.rounds, chain.evaluations) == (1, R)
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
    known = interpolated_log_variance(chain.schedule, step, place)
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
    guess = session.chain(5).evaluate(x, torch.arange(5), condition[0])
    assert condition.dtype == guess.dtype == torch.float32 and bool(guess.isfinite().all())
    mar.diffloss.bfloat16()
    with pytest.raises(VisarError, match="must be in float32, not bfloat16"):
        session.chain(5)


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
        with pytest.raises(VisarError, match=f"9 tokens are decided in 1 to 9 passes, not {passes}"):
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
    bank = NoiseBank.draw(
        noise,
        torch.arange(3).repeat_interleave(N),
        torch.arange(N).repeat(3),
        DiffusionChain(mar.diffloss.net, Schedule(T), 3),
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
    assert [c.steps for c in session.chains[-5:]] == [len(plain_times(k, 950)) for k in counts]


def test_a_model_may_want_less_noisy_steps_alone() -> None:
    def times(latest: int, sampler: MaskedAutoregressive) -> list[int]:
        session = MARSession(tiny(latest=latest), torch.tensor([0]), torch.randperm(N)[None])
        decode(session, sampler, ContinuousTarget(), Noise(0, torch.arange(1)))
        return session.chains[0].times.tolist()

    assert times(999, MaskedAutoregressive(2, 10))[0] == 999 and times(900, MaskedAutoregressive(2, 10))[0] == 900
    assert times(900, MaskedAutoregressive(2, 10, latest=950))[0] == 950
    for wrong in (-1, 1000):
        with pytest.raises(VisarError, match="latest must be from 1 to 999"):
            MaskedAutoregressive(latest=wrong)


def test_drafts_in_closed_form_are_those_step_by_step() -> None:
    torch.manual_seed(0)
    chain = DiffusionChain(HeadNet(3, 8, 16, 1), Schedule(30), 3, temperature=0.9)
    x, guess = torch.randn(5, 3), torch.randn(5, 6)
    steps = torch.tensor([0, 3, 11, 20, 21])[:, None] + torch.arange(8)
    normals = torch.randn(5, 8, 3)
    found, wanted = chain.draft(x, steps, guess, normals), Chain.draft(chain, x, steps, guess, normals)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == (5, 8, 3) and torch.allclose(a, b, atol=2e-6, rtol=1e-5)
    assert chain.draft(x, torch.full((5, 8), 29), guess, normals)[0].isfinite().all()  # behind the end, thrown away
