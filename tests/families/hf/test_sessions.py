"""Sessions over transformers' own modules against one stock pass over the whole sequence: windows, trees, prompts of
unlike lengths, samplers, slots and graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families.hf.worlds import WORLDS, World
from tests.helpers.recording import Recorder
from visar.engine.graphs import Graph
from visar.engine.guidance import Guidance
from visar.engine.loop import decode
from visar.engine.rng import Noise
from visar.engine.tree import Tree
from visar.eval.exactness.late_rows import decoded_late
from visar.eval.exactness.own_model import verify_session
from visar.families.hf.session import TransformersSession
from visar.kernels.backend import backend, triton
from visar.kernels.invariant import invariant
from visar.samplers import Target, get_sampler

ROWS = [0, 1, 2]
QUICK = {"qwen3"}  # the first and most general; what takes seconds is a slow test of the other worlds


@pytest.fixture(params=list(WORLDS))
def world(request: pytest.FixtureRequest) -> World:
    return WORLDS[request.param]()


@torch.inference_mode()
def farthest(world: World, made: Any = TransformersSession) -> float:
    """How far the logits of ragged windows, trees and kept paths are from those of a stock pass, at most."""
    length, generator, worst = 12, torch.Generator().manual_seed(0), 0.0
    vocab = world.decoder.vocab
    tokens = torch.randint(vocab, (3, length + 8), generator=generator)
    session = world.session(ROWS, 6, length, made=made)
    tree, parents = Tree.of([-1, 0, 0, 1, 2, 2]), [-1, 0, 0, 1, 2, 2]
    while int(session.lengths.min()) < length:
        at, trees = session.lengths.tolist(), bool(int(session.lengths.max()) % 2)
        rows = [tokens[r, max(n - 1, 0) : max(n - 1, 0) + 6] for r, n in enumerate(at)]
        fed = torch.stack(rows)
        for r, n in enumerate(at):
            if n == 0:
                fed[r] = tokens[r, :6].roll(1)  # the first is replaced by the prompt's last slot
        if trees:
            fed[:, 1:] = torch.randint(vocab, (3, 5), generator=generator)
        found = torch.cat(
            [
                session.forward(fed[:, :2], tree if trees else None),
                session.forward(fed[:, 2:], tree if trees else None, 2),
            ],
            1,
        )
        for r, n in enumerate(at):
            for node in range(6):
                path, above = [], node
                while above > 0:
                    path, above = [above, *path], parents[above] if trees else above - 1
                if n + len(path) < length:
                    prefix = torch.cat([tokens[r, :n], fed[r, path]])[None]
                    wanted = world.guided(r, prefix)[0, -1]
                    worst = max(worst, float((found[r, node] - wanted).abs().max()))
        count = torch.randint(1, 4, (3,), generator=generator).minimum(length - session.lengths)
        if trees:
            path = torch.tensor([2, 4])
            session.keep(torch.where(torch.arange(2) < count[:, None] - 1, path, -1))
            for r, n in enumerate(at):
                kept = int(count[r]) - 1
                tokens[r, n : n + kept] = fed[r, path[:kept]]
        session.commit(count)
    return worst


def test_windows_and_trees_are_a_stock_pass(world: World) -> None:
    configs = [m.config for m in world.decoder.backbone.modules() if hasattr(m, "config")]
    before = [c._attn_implementation for c in configs]
    assert farthest(world) < 2e-5  # of logits of about 6, in fp32
    assert before and before == [c._attn_implementation for c in configs]


class OneOff(TransformersSession):
    """Known bad: the prompt of row 1 ends one slot earlier."""

    def start(self, *condition: Tensor) -> None:
        super().start(condition[0], condition[1] - (torch.arange(len(condition[1])) == 1).long(), *condition[2:])


class PaddingSeen(TransformersSession):
    """Known bad: all rows go on after the longest prompt, and attend to the padding of the others."""

    def start(self, *condition: Tensor) -> None:
        super().start(*(torch.full_like(c, int(c.max())) if c.ndim == 1 else c for c in condition))


@pytest.mark.parametrize("bad", [OneOff, PaddingSeen])
def test_known_bad_prefixes_are_caught(bad: Any) -> None:
    assert farthest(WORLDS["janus"](), bad) > 0.05


def each(*names: str, quick: str) -> pytest.MarkDecorator:
    """Every world with every name, of which one of the `QUICK` is no slow test."""
    return pytest.mark.parametrize(
        ("kind", "name"),
        [
            pytest.param(kind, name, marks=() if kind in QUICK and name == quick else pytest.mark.slow)
            for kind in WORLDS
            for name in names
        ],
    )


def test_plain_checks(world: World) -> None:
    """Those of `visar verify --session`."""
    checks, _ = verify_session(
        lambda batch, window: world.session([0] * batch, window, 4), lambda tokens: world.guided(0, tokens), []
    )
    assert len(checks) == 8 and all(c.passed for c in checks), [c.message for c in checks if not c.passed]


@each("ar", "sjd", "scd", "speculative-tree", quick="speculative-tree")
def test_joint_distribution_of_images(kind: str, name: str) -> None:
    world = WORLDS[kind]()

    def make(batch: int, window: int, guidance: Guidance | None = None) -> TransformersSession:
        return world.session([0] * batch, window, length=4, guidance=guidance)

    sequences = 2048 if kind in QUICK and name == "speculative-tree" else 16384
    _, rows = verify_session(make, lambda tokens: world.guided(0, tokens), [name], sequences)
    assert rows and all(row.passed for row in rows), rows


@pytest.mark.parametrize("name", ["scd", pytest.param("sjd", marks=pytest.mark.slow)])
def test_rows_that_come_late(world: World, name: str) -> None:
    sampler, images, target = get_sampler(name, window=3), torch.arange(6), Target(0.9)

    def make(batch: int, guidance: Guidance) -> TransformersSession:
        return world.session([0] * batch, 3, guidance=guidance)

    guidance = Guidance(world.scale)
    with torch.inference_mode():
        late = decoded_late(make, sampler, target, guidance, images, 7)
        whole = decode(make(6, guidance), sampler, target, Noise(7, images)).tokens
    assert torch.equal(late, whole)


@each("scd", "sjd", quick="scd")
def test_a_captured_step_is_the_step(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the session is kept, and decodes prompts of other lengths."""
    world = WORLDS[kind]()
    record = Recorder(monkeypatch)
    sampler, target, images = get_sampler(name, window=3), Target(0.9), torch.arange(3)
    with torch.inference_mode():
        kept, graph = world.session([0, 1, 2], 3, 8), Graph(record)
        for rows in ([0, 1, 2], [2, 0, 1]):
            plain = decode(world.session(rows, 3, 8), sampler, target, Noise(3, images), every=2)
            if rows != [0, 1, 2]:
                kept.start(*world.condition(rows))
            found = decode(kept, sampler, target, Noise(3, images), every=2, graph=graph)
            assert torch.equal(found.tokens, plain.tokens) and found.bytes_read == plain.bytes_read
            assert found.replays > 0
    assert record.captures == 1


def test_passes_in_any_order(world: World) -> None:
    """`forward_at`, by which ZipAR decodes."""
    tokens = torch.randint(world.decoder.vocab, (3, 5), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        session = world.session(ROWS, 3)
        written = torch.zeros(5, dtype=torch.bool)
        for positions in ([0], [1, 2], [3], [4]):
            at = torch.tensor(positions)
            written[at] = True
            found = session.forward_at(tokens[:, (at - 1).clamp_min(0)], at, written)
            for r in ROWS:
                wanted = world.guided(r, tokens[r : r + 1, :4])[0, at]
                torch.testing.assert_close(found[r], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_invariant_passes_have_equal_bits(world: World, dtype: torch.dtype) -> None:
    invariant_passes_have_equal_bits(world, dtype)


@pytest.mark.slow
@pytest.mark.skipif(triton is None, reason="torch brings Triton where it has GPU backends only")
@pytest.mark.parametrize("kind", ["janus", "qwen3", "chameleon"])
def test_invariant_passes_have_equal_bits_by_triton(kind: str) -> None:
    with backend("triton"):
        invariant_passes_have_equal_bits(WORLDS[kind](), torch.bfloat16)


def invariant_passes_have_equal_bits(world: World, dtype: torch.dtype) -> None:
    tokens = torch.randint(world.decoder.vocab, (3, 5), generator=torch.Generator().manual_seed(2))
    world.model.to(dtype)
    try:
        with torch.inference_mode(), invariant():
            many = world.session(ROWS, 5).forward(tokens)
            for row in ROWS:
                alone = world.session([row], 1)
                for n in range(5):
                    found = alone.forward(tokens[row : row + 1, n : n + 1])
                    assert torch.equal(found[0, 0], many[row, n]), (row, n)
                    alone.commit(torch.ones_like(alone.lengths))
    finally:
        world.model.to(torch.float32)
