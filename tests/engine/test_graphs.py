"""Captured steps against steps taken one by one, through a recorder that stands in for CUDA graphs on a CPU."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.eval.exactness.test_ranks import tiny
from tests.helpers.recording import Recorder
from tests.helpers.worlds import LARGE, conditions_of, made, session_of, world
from visar.engine.graphs import WARM, Graph, RowGraphs, Rows, SessionCache, cuda_graph, refill
from visar.engine.guidance import Guidance
from visar.engine.loop import Decoded, decode
from visar.engine.rng import Noise
from visar.families.mar.session import MARSession
from visar.samplers import ContinuousTarget, Target, get_sampler, samplers_for, values_of

TARGET = Target(0.9, 40, 0.95)
CAPTURED = [name for name, spec in samplers_for("discrete").items() if getattr(spec.make(), "capturable", True)]
SHORT = ("ar", "scd", "eagle2")  # the others are much like these
IMAGES, OTHERS = torch.arange(3), torch.arange(3) + 4


def same(a: Decoded, b: Decoded) -> None:
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.commit_pass, b.commit_pass) and a.passes == b.passes


def session(kind: str, name: str, images: torch.Tensor, **settings: Any) -> Any:
    return session_of(world(kind, **LARGE), made(name), images, **settings)


def test_a_capture_minds_its_own_thread_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that make pixels allocate memory meanwhile, which would end it."""
    given: list[Any] = []

    def graph(_: Any, **more: Any) -> Any:
        given.append(more)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    cuda_graph(lambda: None)
    assert given == [{"capture_error_mode": "thread_local"}]


@pytest.mark.parametrize("name", [n if n in SHORT else pytest.param(n, marks=pytest.mark.slow) for n in CAPTURED])
def test_a_captured_step_is_the_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the session and the graph are kept, and decode other conditions from another seed."""
    record = Recorder(monkeypatch)
    sampler, graph, kept = made(name), Graph(record), session("text", name, IMAGES)
    for images, seed in ((IMAGES, 3), (OTHERS, 9)):
        plain = decode(session("text", name, images), sampler, TARGET, Noise(seed, images), every=2)
        if images is OTHERS:
            condition = conditions_of(world("text", **LARGE), images)
            kept.start(*condition)
            if kept.drafter is not None:
                kept.drafter.start(*condition)
        found = decode(kept, sampler, TARGET, Noise(seed, images), every=2, graph=graph)
        same(found, plain)
        assert found.replays == found.passes - (WARM if images is IMAGES else 0)
        assert found.bytes_read == plain.bytes_read
    assert record.captures == 1


@pytest.mark.parametrize(
    ("name", "graphs"),
    [
        ("ar", True),
        ("hydra", False),
        *(pytest.param(n, True, marks=pytest.mark.slow) for n in ("scd", "speculative", "eagle", "hydra")),
    ],
)
def test_the_unconditional_half_is_left_when_guidance_is_over(
    name: str, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Recorder(monkeypatch)
    sampler, guidance = made(name), Guidance(3.0, interval=5)
    long = session("text", name, IMAGES, guidance=guidance)
    long.watched = False  # as if nobody looked
    plain = decode(long, sampler, TARGET, Noise(1, IMAGES))
    short = session("text", name, IMAGES, guidance=guidance)
    found = decode(short, sampler, TARGET, Noise(1, IMAGES), graph=Graph(record) if graphs else None)
    assert torch.equal(found.tokens, plain.tokens)
    assert long.batches == 2 and short.batches == 1
    assert found.bytes_read < plain.bytes_read
    assert record.captures == (2 if graphs else 0)


def test_a_step_that_cannot_be_captured_is_taken_by_the_host(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(step: Any) -> Any:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    plain = decode(session("text", "scd", IMAGES), made("scd"), TARGET, Noise(0, IMAGES))
    found = decode(session("text", "scd", IMAGES), made("scd"), TARGET, Noise(0, IMAGES), graph=Graph(refuse))
    same(found, plain)
    assert found.replays == 0
    assert [r.message for r in caplog.records] == [
        "A step could not be captured, so it is slower: CUDA error: operation not permitted when stream is capturing"
    ]


def test_the_recorder_catches_what_a_graph_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that is bound anew, and a look at the device."""
    sampler = made("scd")

    class Rebinds(type(sampler)):  # type: ignore[misc]
        def step(self, session: Any, state: Any) -> None:
            super().step(session, state)
            state.tokens = state.tokens.clone()

    class Looks(type(sampler)):  # type: ignore[misc]
        def step(self, session: Any, state: Any) -> None:
            super().step(session, state)
            int(session.lengths.min())

    record = Recorder(monkeypatch)
    plain = decode(session("text", "scd", IMAGES), sampler, TARGET, Noise(3, IMAGES), every=2)
    looks, rebinds = (kind(**values_of(sampler)) for kind in (Looks, Rebinds))
    found = decode(session("text", "scd", IMAGES), looks, TARGET, Noise(3, IMAGES), every=2, graph=Graph(record))
    assert found.replays == 0
    same(found, plain)
    found = decode(session("text", "scd", IMAGES), rebinds, TARGET, Noise(3, IMAGES), every=2, graph=Graph(record))
    assert not torch.equal(found.tokens, plain.tokens)


def test_graphs_are_bounded() -> None:
    kept = SessionCache(limit=2)
    for key in "abc":
        kept.give(key, key.upper(), Graph())
    assert len(kept) == 2 and kept.take("a") is None
    found = kept.take("b")
    assert found is not None and found[0] == "B" and kept.take("b") is None
    kept.clear()
    assert len(kept) == 0


def test_refilling_what_differs_is_refused() -> None:
    refill(Target(0.5), Target(0.5))
    with pytest.raises(ValueError, match=r"0\.5 was captured, not 0\.7"):
        refill(Target(0.5), Target(0.7))
    old = [torch.zeros(2), Noise(1, torch.zeros(2))]
    refill(old, [torch.ones(2), Noise(7, torch.ones(2))])
    assert old[0].tolist() == [1, 1] and old[1].key.tolist() == [[7, 0], [7, 0]] and old[1].images.tolist() == [1, 1]  # type: ignore[attr-defined]


def test_functions_of_rows_are_filled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Recorder(monkeypatch)
    weight = torch.randn(3, 4)
    function = Rows(lambda x, scale: (x @ weight) * scale[:, None], record, most=8)
    for count in (1, 5, 7, 8, 3, 5, 20, 0):
        x, scale = torch.randn(count, 3), torch.rand(count)
        assert torch.allclose(function(x, scale), (x @ weight) * scale[:, None])
    assert record.captures == 3  # for 1, 8 and 4 rows
    first = function(torch.ones(1, 3), torch.ones(1))
    kept = first.clone()
    function(torch.zeros(1, 3), torch.ones(1))
    assert torch.equal(first, kept)  # what was given out is not written again
    weight.mul_(2)
    assert torch.allclose(function(torch.ones(1, 3), torch.ones(1)), 2 * kept)


def test_graphs_of_functions_are_bounded() -> None:
    graphs = RowGraphs(limit=2)
    one = graphs.of("a", len)
    assert graphs.of("b", len) is not one and graphs.of("a", sum) is one
    graphs.of("c", len)
    assert graphs.of("a", len) is one and graphs.of("b", max).function is max


@pytest.mark.parametrize(
    "name", ["mar-headspec", "cspd-exact", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mar", "mar-disa"))]
)
def test_a_captured_diffusion_head(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Recorder(monkeypatch)
    images, mar = torch.arange(2), tiny()

    def decoded(graphs: RowGraphs | None) -> tuple[Decoded, MARSession]:
        noise = Noise(7, images)
        orders = torch.stack([torch.randperm(mar.length, generator=torch.Generator().manual_seed(i)) for i in range(2)])
        made, draft = (MARSession(mar, images, orders, scale=1.5, graphs=graphs) for _ in range(2))
        made.draft = draft
        sampler = replace(get_sampler(name), head_steps=6)
        if name.startswith("mar"):
            sampler = replace(sampler, steps=4, last_head_steps=3 if name == "mar-disa" else 0)
        return decode(made, sampler, ContinuousTarget(), noise), made

    plain, session = decoded(None)
    graphs = RowGraphs(record)
    captures = []
    for _ in range(2):
        found, captured = decoded(graphs)
        assert torch.allclose(found.tokens, plain.tokens, atol=1e-4)
        assert [c.calls for c in captured.denoisers] == [c.calls for c in session.denoisers]
        assert [c.evaluations for c in captured.denoisers] == [c.evaluations for c in session.denoisers]
        captures.append(record.captures)
    assert captures[0] == captures[1] > 0
    for p in list(mar.diffloss.parameters())[2:]:  # the first ones stay where they are
        p.data = p.data * 1.5
    assert torch.allclose(decoded(graphs)[0].tokens, decoded(None)[0].tokens, atol=1e-4)
