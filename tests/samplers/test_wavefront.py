"""ZipAR: what each pass feeds and sees, against a pass over all that was ever fed."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.tiny import class_gpt, text_gpt
from visar.engine.guidance import Guidance
from visar.engine.layout import Layout
from visar.engine.loop import decode
from visar.engine.rng import Noise
from visar.errors import VisarError
from visar.eval.exactness.tabular import TabularModel, TabularSession
from visar.families.llamagen.rotary import turned
from visar.families.llamagen.session import LlamaGenSession
from visar.samplers import Autoregressive, Target, ZipAR

GRID = 5
SQUARE = Layout(GRID, GRID)
GUIDANCE = Guidance(2.0)
CAPTIONS = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(7))
MASK = torch.arange(4) >= torch.tensor([[0], [2], [3]])  # 4, 2 and 1 valid slots
CLASSES = torch.tensor([0, 3, 6])
TARGET = Target(0.8, top_p=0.9)


class Fed(NamedTuple):
    """An input as it was fed: the token, its place, the pass, and the logits that came of it."""

    token: Tensor
    place: int
    turn: int
    logits: Tensor


class Recording(LlamaGenSession):
    """Starts with a cache full of what must never be read, and notes every pass."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.cache.keys[:, :, self.prefix - 1 - self.folded :] = 1e3
        self.cache.values[:, :, self.prefix - 1 - self.folded :] = 1e3
        self.fed: list[list[Fed]] = []

    def forward_at(self, tokens: Tensor, places: Tensor, written: Tensor) -> Tensor:
        logits = super().forward_at(tokens, places, written)
        turn = len(self.fed)
        self.fed.append([Fed(tokens[:, i], int(n), turn, logits[:, i]) for i, n in enumerate(places)])
        return logits


def session(kind: str, length: int = GRID**2) -> Recording:
    torch.manual_seed(3)
    model = text_gpt() if kind == "text" else class_gpt()
    torch.nn.init.normal_(model.output.weight)
    condition, mask = (CAPTIONS, MASK) if kind == "text" else (CLASSES, None)
    return Recording(model, condition, mask, length=length, window=GRID, grid=GRID, guidance=GUIDANCE)


@pytest.mark.parametrize("ahead", [1, 2, 4])
@pytest.mark.parametrize("kind", ["text", "class"])
def test_every_input_sees_what_was_there_before_it(kind: str, ahead: int) -> None:
    s = session(kind)
    found = decode(s, ZipAR(ahead, SQUARE), TARGET, Noise(1, torch.arange(3)))
    fed = [f for turn in s.fed for f in turn]
    assert len(s.fed) == found.passes == GRID + (GRID - 1) * ahead
    # All that was ever fed as one sequence: an input sees the newest version of each place that is not behind its own.
    mask = torch.zeros(len(fed), len(fed), dtype=torch.bool)
    for i, mine in enumerate(fed):
        newest: dict[int, int] = {}
        for j, other in enumerate(fed):
            if other.turn <= mine.turn and other.place <= mine.place:
                newest[other.place] = j
        mask[i, list(newest.values())] = True
    model, before = s.model, s.prefix - 1
    tokens = torch.stack([f.token for f in fed], dim=1)
    places = torch.tensor([f.place for f in fed])
    x = model.tok_embeddings(tokens).repeat(2, 1, 1)
    x = torch.cat([s.condition[:, :-1], torch.where((places == 0)[:, None], s.condition[:, -1:], x)], dim=1)
    own = torch.eye(len(x[0]), dtype=torch.bool)
    seen = torch.zeros_like(own)
    seen[:before, :before] = own.new_ones(before, before).tril()
    seen[before:, :before] = True
    seen[before:, before:] = mask
    valid = torch.cat([s.valid[:, :before], torch.ones(len(x), len(fed), dtype=torch.bool)], dim=1)
    whole = seen & valid[:, None] | own

    def attend(_: int, qkv: Tensor, table: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in turned(qkv, table))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=whole[:, None]).transpose(1, 2)

    rows = torch.cat([torch.arange(before), places + before])
    logits = model.logits(model.run(x, model.rotary(GRID)[rows].expand(len(x), -1, -1, -1), attend))[:, before:]
    wanted = GUIDANCE.combine(*logits.chunk(2), places.expand(3, -1))
    for i, f in enumerate(fed):
        assert torch.allclose(f.logits, wanted[:, i], atol=1e-4), (f.place, f.turn)


@pytest.mark.parametrize("kind", ["text", "class"])
def test_a_whole_row_ahead_is_plain_decoding(kind: str) -> None:
    noise = Noise(4, torch.arange(3))
    plain = decode(session(kind), Autoregressive(), TARGET, noise)
    for ahead in (GRID, 99):
        found = decode(session(kind), ZipAR(ahead, SQUARE), TARGET, noise)
        assert torch.equal(found.tokens, plain.tokens) and torch.equal(found.commit_pass, plain.commit_pass)
    early = decode(session(kind), ZipAR(2, SQUARE), TARGET, noise)
    assert not torch.equal(early.tokens, plain.tokens)
    assert torch.equal(early.tokens[:, :GRID], plain.tokens[:, :GRID])  # nothing is missing above the first row


@pytest.mark.parametrize("layout", [Layout(3, 5), Layout(5, 3), Layout(3, 4, line_end=True)])
def test_images_that_are_not_square(layout: Layout) -> None:
    """The token at the end of a row is one of the row; in plain order it is plain decoding."""
    noise, length = Noise(4, torch.arange(3)), layout.length
    plain = decode(session("class", length), Autoregressive(), TARGET, noise)
    whole = decode(session("class", length), ZipAR(99, layout), TARGET, noise)
    assert torch.equal(whole.tokens, plain.tokens) and torch.equal(whole.commit_pass, plain.commit_pass)
    early = decode(session("class", length), ZipAR(1, layout), TARGET, noise)
    assert early.passes == layout.stride + layout.rows - 1 and int(early.commit_pass.min()) == 0
    assert torch.equal(early.tokens[:, : layout.stride], plain.tokens[:, : layout.stride])
    assert ZipAR(1, layout).window == layout.rows or layout.stride < layout.rows
    assert max(turn.new for turn in ZipAR(1, layout).turns) == ZipAR(1, layout).window


def test_the_true_token_takes_the_place_of_its_stand_in() -> None:
    turns = ZipAR(2, Layout(4, 4)).turns
    assert turns[2] == ((1, 1), (2, 4), 2)  # row 1 begins: token 1 is the newest of row 0, and is used for token 3
    assert turns[4] == ((4 + 1, 4 + 1, 3), (6, 8, 4), 2)  # row 0 is complete: token 3 is fed at position 4
    sampled = [position for turn in turns for position in turn.positions[: turn.new]]
    assert sorted(sampled) == list(range(16)) and len(turns) == 4 + 3 * 2
    assert max(turn.new for turn in turns) == ZipAR(2, Layout(4, 4)).window == 2


def test_passes_after_the_last_change_nothing() -> None:
    noise = Noise(4, torch.arange(3))
    found, late = (decode(session("class"), ZipAR(2, SQUARE), TARGET, noise, every=n) for n in (1, 9))
    assert late.passes > found.passes and torch.equal(late.tokens, found.tokens)


def test_what_is_forced_stays() -> None:
    forced = torch.full((GRID**2,), -1)
    forced[[0, 7, 20]] = 3
    found = decode(session("class"), ZipAR(1, SQUARE), Target(forced=forced), Noise(4, torch.arange(3)))
    assert bool((found.tokens[:, [0, 7, 20]] == 3).all())


def test_bad_input() -> None:
    with pytest.raises(VisarError, match="ahead must be 1 or more"):
        ZipAR(ahead=0)
    with pytest.raises(VisarError, match="zipar needs layout"):
        decode(session("class"), ZipAR(), Target(), Noise(0, torch.arange(3)))
    tabular = TabularSession(TabularModel.markov(3, 4, seed=0), 1, 2)
    with pytest.raises(VisarError, match="TabularSession decodes in raster order only"):
        decode(tabular, ZipAR(1, Layout(2, 2)), Target(), Noise(0, torch.arange(1)))
