"""LlamaGen's arithmetic: cached windows against whole sequences, guidance, condition slots, an independent forward
pass, and golden values that the authors' own code computed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from visar.engine.guidance import Guidance
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.rotary import rotary_table, rotate
from visar.families.llamagen.session import LlamaGenSession
from visar.families.llamagen.vq import VQModel

GOLDEN = json.loads((Path(__file__).parent / "golden" / "llamagen_tiny.json").read_text())
VOCAB, GRID, LENGTH = 19, 4, 16
SIZES = {
    "class": dict(dim=32, num_layers=2, num_heads=2, ffn=48, condition="class", classes=5),
    "text": dict(dim=64, num_layers=3, num_heads=4, ffn=80, condition="text", condition_length=5, caption_features=12),
    "head100": dict(dim=200, num_layers=2, num_heads=2, ffn=64, condition="class", classes=5),
}
WINDOWS = (1, 2, 3, 5, 8)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def model(kind: str) -> LlamaGen:
    """Random weights that are large enough for every part to matter, the output head among them."""
    torch.manual_seed(0)
    gpt = LlamaGen(vocab_size=VOCAB, grid=GRID, **SIZES[kind]).eval()
    for name, p in gpt.named_parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5) if p.ndim == 2 else p.add_(torch.randn_like(p) * 0.2)
        assert p.abs().sum() > 0, name
    return gpt


def condition(kind: str, batch: int = 3) -> tuple[Tensor, Tensor | None]:
    """Conditions of `batch` rows; captions have 2, 3, ... valid slots, at the end."""
    if kind != "text":
        return torch.arange(batch) % 5, None
    mask = torch.arange(5) >= torch.tensor([3 - i % 4 for i in range(batch)])[:, None]
    features = torch.randn(batch, 5, 12, generator=torch.Generator().manual_seed(1)) * mask[..., None]
    return features, mask


def tokens(batch: int = 3, length: int = LENGTH, seed: int = 2) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def window_of(ids: Tensor, at: Tensor, window: int, junk: int) -> Tensor:
    """The last committed token and the drafts after it; `junk` stands where there is none."""
    index = at[:, None] - 1 + torch.arange(window)
    inside = (index >= 0) & (index < ids.shape[1])
    return torch.where(inside, ids.gather(1, index.clamp(0, ids.shape[1] - 1)), junk)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kind", SIZES)
def test_cached_windows_equal_the_whole_sequence(kind: str, window: int) -> None:
    """Ragged commits, wrong drafts first in every pass, and windows that run past the end."""
    gpt, (cond, mask), ids = model(kind), condition(kind), tokens()
    expected = gpt(cond, ids[:, :-1], mask)
    session = LlamaGenSession(gpt, cond, mask, length=LENGTH, window=window)
    counts, seen, past_end = torch.tensor([1, 2, 3]), torch.zeros(3, LENGTH, dtype=torch.bool), False
    while (session.lengths < LENGTH).any():
        at = session.lengths.clone()
        right = window_of(ids, at, window, junk=7)
        wrong = right.clone()
        wrong[:, 1:] = (wrong[:, 1:] + 1) % VOCAB
        session.forward(wrong)  # nothing of it is committed, so nothing of it may be seen later
        got = session.forward(right)
        for b in range(3):
            for j in range(window):
                if (position := int(at[b]) + j) < LENGTH:
                    torch.testing.assert_close(got[b, j], expected[b, position], rtol=0, atol=1e-5)
                    seen[b, position] = True
                else:
                    past_end = True
        session.commit(torch.minimum(counts.clamp_max(window), LENGTH - at))
        counts = counts.roll(1)
    assert seen.all() and (past_end or window == 1)


def test_a_draft_changes_only_what_follows_it() -> None:
    gpt, (cond, mask), ids = model("text"), condition("text"), tokens()
    session = LlamaGenSession(gpt, cond, mask, length=LENGTH, window=5)
    session.forward(window_of(ids, session.lengths, 5, 0))
    session.commit(torch.tensor([4, 1, 2]))
    right = window_of(ids, session.lengths, 5, 0)
    wrong = right.clone()
    wrong[:, 3] = (wrong[:, 3] + 1) % VOCAB
    a, b = session.forward(right), session.forward(wrong)
    assert torch.equal(a[:, :3], b[:, :3])
    assert ((a[:, 3:] - b[:, 3:]).abs().amax(-1) > 1e-3).all()


def test_masked_caption_slots_are_not_seen() -> None:
    gpt, (cond, mask), ids = model("text"), condition("text"), tokens()
    other = torch.where(mask[..., None], cond, cond + 3)
    for run in (
        lambda c: gpt(c, ids[:, :6], mask),
        lambda c: LlamaGenSession(gpt, c, mask, length=LENGTH, window=4).forward(ids[:, :4]),
    ):
        torch.testing.assert_close(run(cond), run(other), rtol=0, atol=1e-6)
    assert (gpt(cond, ids[:, :6]) - gpt(cond, ids[:, :6], mask)).abs().max() > 1e-2
    empty = torch.zeros_like(mask)  # then the last slot still attends to itself
    session = LlamaGenSession(gpt, cond, empty, length=LENGTH, window=4)
    torch.testing.assert_close(session.forward(ids)[:, :1], gpt(cond, ids[:, :0], empty), rtol=0, atol=1e-5)


@pytest.mark.parametrize("interval", [-1, 0, 4])
@pytest.mark.parametrize("kind", ["class", "text"])
def test_guidance_is_the_mix_of_two_separate_sessions(kind: str, interval: int) -> None:
    gpt, (cond, mask), ids = model(kind), condition(kind), tokens()
    scale, window = 3.5, 4
    null = gpt.cls_embedding.null_like(cond)
    assert kind == "text" or null.tolist() == [5, 5, 5]
    both = LlamaGenSession(gpt, cond, mask, length=LENGTH, window=window, guidance=Guidance(scale, interval))
    halves = [LlamaGenSession(gpt, c, mask, length=LENGTH, window=window) for c in (cond, null)]
    counts = torch.tensor([4, 1, 3])
    for _ in range(3):
        draft = window_of(ids, both.lengths, window, 0)
        c, u = (s.forward(draft) for s in halves)
        got = both.forward(draft)
        for b in range(3):
            for j in range(window):
                guided = interval < 0 or int(both.lengths[b]) + j <= interval + 1
                expected = u[b, j] + scale * (c[b, j] - u[b, j]) if guided else c[b, j]
                torch.testing.assert_close(got[b, j], expected, rtol=0, atol=1e-4)
        assert (c - u).abs().max() > 1e-2
        for s in (both, *halves):
            s.commit(counts)


@pytest.mark.parametrize("kind", SIZES)
def test_keys_of_condition_slots_are_zero(kind: str) -> None:
    gpt, (cond, mask), ids = model(kind), condition(kind), tokens()
    session = LlamaGenSession(gpt, cond, mask, length=LENGTH, window=3, guidance=Guidance(2.0))
    session.forward(ids[:, :3])
    root = 1 if gpt.config.condition_length > 1 else 0  # the slots before the last are one
    assert session.cache.keys.shape[2] == root + LENGTH + 3
    assert (session.cache.keys[:, :, : root + 1] == 0).all()
    assert (session.cache.keys[:, :, root + 1 : root + 3] != 0).any(-1).all()
    assert (session.cache.values[:, :, root] != 0).any(-1).all()


def test_first_logits_depend_on_the_class_alone() -> None:
    gpt = model("class")
    session = LlamaGenSession(gpt, torch.tensor([2, 2, 4]), length=LENGTH, window=3)
    first = session.forward(tokens())[:, 0]
    torch.testing.assert_close(first[0], first[1], rtol=0, atol=1e-6)
    assert (first[0] - first[2]).abs().max() > 1e-2
    torch.testing.assert_close(gpt(torch.tensor([2]), tokens(1, 0))[:, 0], first[:1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("head_dim", "prefix"), [(16, 1), (64, 5), (100, 1)])
def test_rotation_is_complex_multiplication_of_adjacent_pairs(head_dim: int, prefix: int) -> None:
    table = rotary_table(prefix, GRID, head_dim)
    assert table.shape == (prefix + GRID**2, head_dim // 2, 2)
    x = torch.randn(1, prefix + GRID**2, 2, head_dim, dtype=torch.float32)
    got = rotate(x, table[None])
    assert (got[:, :prefix] == 0).all()  # not an identity rotation: cosine and sine are both zero
    quarter = head_dim // 4
    for n in range(GRID**2):
        row, column = divmod(n, GRID)
        for pair in range(2 * quarter):
            turn = (row if pair < quarter else column) * 10000.0 ** (-2 * (pair % quarter) / (head_dim / 2))
            a, b = x[0, prefix + n, 1, 2 * pair : 2 * pair + 2].tolist()
            z = complex(a, b) * complex(math.cos(turn), math.sin(turn))
            pair_got = got[0, prefix + n, 1, 2 * pair : 2 * pair + 2].tolist()
            assert pair_got == pytest.approx([z.real, z.imag], abs=1e-5)


def plain_forward(state: dict[str, Tensor], heads: int, prefix: int, cond: Tensor, ids: Tensor, valid: list[bool]):
    """One row, float64, position after position, head after head, from the table of keys alone."""
    s = {k: v.double() for k, v in state.items()}

    def norm(x: Tensor, key: str) -> Tensor:
        return x / (x.pow(2).mean() + 1e-5).sqrt() * s[key]

    def turned(x: Tensor, position: int) -> Tensor:
        if position < prefix:
            return torch.zeros_like(x)
        quarter, out = len(x) // 4, x.clone()
        for p in range(2 * quarter):
            where = (position - prefix) // GRID if p < quarter else (position - prefix) % GRID
            angle = where * 10000 ** (-2 * (p % quarter) / (2 * quarter))
            z = complex(x[2 * p], x[2 * p + 1]) * complex(math.cos(angle), math.sin(angle))
            out[2 * p], out[2 * p + 1] = z.real, z.imag
        return out

    if "cls_embedding.embedding_table.weight" in s:
        rows = [s["cls_embedding.embedding_table.weight"][int(cond)]]
    else:
        up = [s["cls_embedding.cap_proj.fc1.weight"] @ f for f in cond.double()]
        up = [0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) for x in up]
        rows = [s["cls_embedding.cap_proj.fc2.weight"] @ x for x in up]
    rows += [s["tok_embeddings.weight"][int(i)] for i in ids]
    valid = valid + [True] * len(ids)
    layers = 1 + max(int(k.split(".")[1]) for k in s if k.startswith("layers."))
    for i in range(layers):
        at, size = f"layers.{i}.", len(rows[0]) // heads
        qkv = [s[at + "attention.wqkv.weight"] @ norm(x, at + "attention_norm.weight") for x in rows]
        parts = [[part.split(size) for part in x.chunk(3)] for x in qkv]  # [position][q, k, v][head]
        keys = [[turned(k, n) for k in parts[n][1]] for n in range(len(rows))]
        new = []
        for n, x in enumerate(rows):
            seen = [m for m in range(n + 1) if valid[m] or m == n]
            mixed = []
            for h in range(heads):
                q = turned(parts[n][0][h], n)
                weights = torch.stack([q @ keys[m][h] / math.sqrt(size) for m in seen]).softmax(0)
                mixed.append(sum(w * parts[m][2][h] for w, m in zip(weights, seen, strict=True)))
            x = x + s[at + "attention.wo.weight"] @ torch.cat(mixed)
            y = norm(x, at + "ffn_norm.weight")
            gate, value = (s[at + f"feed_forward.w{j}.weight"] @ y for j in (1, 3))
            new.append(x + s[at + "feed_forward.w2.weight"] @ (gate / (1 + torch.exp(-gate)) * value))
        rows = new
    return torch.stack([s["output.weight"] @ norm(x, "norm.weight") for x in rows[prefix - 1 :]])


@pytest.mark.parametrize("kind", SIZES)
def test_forward_agrees_with_plain_loops(kind: str) -> None:
    gpt, (cond, mask), ids = model(kind), condition(kind, 2), tokens(2, 7)
    got, prefix = gpt(cond, ids, mask), gpt.config.condition_length
    for b in range(2):
        valid = [True] if mask is None else mask[b].tolist()
        expected = plain_forward(gpt.state_dict(), gpt.config.num_heads, prefix, cond[b], ids[b], valid)
        torch.testing.assert_close(got[b].double(), expected, rtol=0, atol=1e-5)


def fill(module: torch.nn.Module, count: int) -> None:
    """The weights of the golden file: hashed numbers in [-0.3, 0.3), norm weights around 1, by sorted key."""
    state = module.state_dict()
    assert len(state) == count
    for i, key in enumerate(sorted(state)):
        x = ((torch.arange(state[key].numel(), dtype=torch.float64) + 1000.0 * i) * 12.9898).sin() * 43758.5453
        x = ((x - x.floor()) * 2 - 1) * 0.3 + (1 if "norm" in key and key.endswith("weight") else 0)
        state[key].copy_(x.view(state[key].shape))


@pytest.mark.parametrize("kind", ["class", "text"])
def test_logits_of_the_authors_code(kind: str) -> None:
    gold = GOLDEN[kind]
    gpt = LlamaGen(**gold["config"]).eval()
    fill(gpt, gold["keys"])
    cond, mask, ids = torch.tensor([3, 0]), None, torch.tensor(gold["tokens"])
    if kind == "text":
        mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]]).bool()
        cond = (torch.linspace(-1, 1, 2 * 4 * 12).cos().view(2, 4, 12) * 2 - 1) * mask[..., None]
    session = LlamaGenSession(gpt, cond, mask, length=9, window=9, guidance=Guidance(gold["guidance"]))
    got = session.forward(torch.cat([torch.zeros(2, 1, dtype=torch.long), ids], 1))
    torch.testing.assert_close(got, torch.tensor(gold["logits"]), rtol=0, atol=1e-4)


def test_pixels_and_ids_of_the_authors_code() -> None:
    gold = GOLDEN["vq"]
    vq = VQModel(**gold["config"]).eval()
    fill(vq, gold["keys"])
    pixels = torch.arange(3 * 8 * 8, dtype=torch.float64).mul(0.9).sin().float().view(1, 3, 8, 8)
    ids = vq.encode(pixels)
    assert ids.tolist() == gold["ids"]
    torch.testing.assert_close(vq.decode(ids).flatten(1), torch.tensor(gold["pixels"]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("multipliers", [(1, 1, 2, 2, 2), (1, 2, 2, 2)])
def test_tokenizer_shapes_and_codebook_scale(multipliers: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    vq = VQModel(24, 4, 32, multipliers, res_blocks=1, z_channels=16).eval()
    cell = 2 ** (len(multipliers) - 1)
    pixels = torch.rand(2, 3, 2 * cell, 3 * cell) * 2 - 1
    ids = vq.encode(pixels)
    assert ids.shape == (2, 6) and int(ids.min()) >= 0 and int(ids.max()) < 24
    image = vq.decode(ids, height=2)
    assert image.shape == pixels.shape
    vq.quantize.embedding.weight.mul_(torch.rand(24, 1) * 5 + 0.1)
    assert torch.equal(vq.encode(pixels), ids)
    torch.testing.assert_close(vq.decode(ids, height=2), image, rtol=0, atol=1e-5)
