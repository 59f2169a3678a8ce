"""Requests of visitors on the engine: the images of the models alone, in one batch; stops; a race on one clock."""

# ruff: noqa: F811 (fixtures that are imported)
from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.helpers.stepped import alone, assert_same, held, request_of, served, until
from tests.pipelines.test_masked import masked_folder  # noqa: F401  (a fixture)
from tests.pipelines.test_masked import pipe as masked_pipe  # noqa: F401
from visar.demo import runs as module
from visar.demo.models import DemoModel, named
from visar.demo.requests import Limits, Request
from visar.demo.runs import Run, Runs, Stopped
from visar.errors import VisarError
from visar.generation.pool import Finished, Glance, Pool
from visar.serving.engine import Engine
from visar.serving.jobs import Busy, Partial


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(rows=4, waiting=40, pools=6)
    yield made
    assert made.close(drain=False, timeout=60)


@pytest.fixture
def model(text_pipe: Any) -> DemoModel:
    return DemoModel("tiny", text_pipe.image_model)


def test_strangers_at_once_get_what_they_asked_for(
    engine: Engine, text_pipe: Any, class_pipe: Any, masked_pipe: Any
) -> None:
    models = named([("words", text_pipe), ("classes", class_pipe), ("masked", masked_pipe)]).values()
    prompts, samplers = ("red heart", "blue cat", "star"), (("scd", "ar"), ("sjd",), ("mar",))
    wanted = [
        request_of(m, prompts[k], *own, seed=10 + k, label=k, images=1 + k % 2, temperature=0.8 + k / 10)
        for m, own in zip(models, samplers, strict=True)
        for k in range(3)
    ]
    desk = Runs(engine, Limits())

    async def visit(number: int) -> list[Run]:
        return [list(shown) async for shown in desk.serve(f"visitor {number}", wanted[number])][-1]

    async def all_at_once() -> list[list[Run]]:
        return await asyncio.gather(*(visit(n) for n in range(len(wanted))))

    for request, runs in zip(wanted, asyncio.run(all_at_once()), strict=True):
        for number in range(len(request.samplers)):
            assert_same([run for run in runs if run.number == number], alone(request, number))
    assert engine.counts.row_passes > engine.counts.passes  # some were in one batch


def test_what_is_shown_while_it_is_decoded(engine: Engine, model: DemoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", 0)
    request, seen = request_of(model, "red heart", "ar"), []

    async def watch() -> None:
        async for (run,) in Runs(engine, Limits()).serve("me", request):
            if run.frame is not None and run.frame.finished is None:
                seen.append(run.frame)

    asyncio.run(watch())
    out = alone(request)
    assert seen
    for frame in seen:
        known = frame.event.commit_pass >= 0
        assert int(known.sum()) == frame.at.committed == frame.at.passes
        assert torch.equal(frame.event.commit_pass[known], out.commit_pass[0][known])
        assert frame.image.getpixel((frame.image.width - 1, frame.image.height - 1)) == (128, 128, 128)


@pytest.mark.parametrize("passes", [0, 3])
def test_a_stop(engine: Engine, model: DemoModel, passes: int) -> None:
    desk = Runs(engine, Limits())

    async def visit() -> None:
        async for _ in desk.serve("me", request_of(model, "red heart", "ar")):
            pass

    async def stopped() -> str:
        with held(passes):
            task = asyncio.ensure_future(visit())
            await asyncio.sleep(0)
            await asyncio.to_thread(until, lambda: engine.counts.passes >= passes - 1)
            assert not desk.stop("another")
            assert desk.stop("me")
            with pytest.raises(Stopped) as said:
                await task
            assert not desk.stop("me")
            await asyncio.to_thread(until, lambda: engine.running + engine.queued == 0)  # while others are held
            return str(said.value)

    assert re.fullmatch(
        "Stopped before it began." if passes == 0 else r"Stopped after [23] passes\.", asyncio.run(stopped())
    )
    request = request_of(model, "star")
    assert_same(served(engine, request), alone(request))


def test_who_leaves_frees_the_rows(engine: Engine, model: DemoModel) -> None:
    async def visit() -> None:
        async for _ in Runs(engine, Limits()).serve("me", request_of(model, "red heart", "ar", images=3)):
            pass

    async def leave() -> None:
        task = asyncio.ensure_future(visit())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with held(2):
        asyncio.run(leave())
        until(lambda: engine.running + engine.queued == 0)
    assert engine.counts.cancelled == 3 and engine.counts.finished == 0


def test_limits(model: DemoModel) -> None:
    engine = Engine(rows=1, waiting=1)
    with pytest.raises(Busy, match="Too many requests are waiting"):
        served(engine, request_of(model, images=3))
    with held(), pytest.raises(VisarError, match="not ready in time"):

        async def late() -> None:
            async for _ in Runs(engine, Limits(seconds=0)).serve("me", request_of(model)):
                pass

        asyncio.run(late())
    assert engine.close(drain=False, timeout=60)


@pytest.mark.parametrize("error", [RuntimeError("cuda"), VisarError("No."), torch.OutOfMemoryError("full")])
def test_a_request_that_fails_leaves_the_next_alone(
    engine: Engine, model: DemoModel, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(pool: Pool) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Pool, "step", fail)
        with pytest.raises(type(error)):
            served(engine, request_of(model))
    wanted = request_of(model, "star", seed=9)
    assert_same(served(engine, wanted), alone(wanted))


def test_a_model_is_warmed_and_then_idle(engine: Engine, text_pipe: Any, masked_pipe: Any) -> None:
    Runs(engine, Limits()).warm(list(named([("words", text_pipe), ("masked", masked_pipe)]).values()))
    until(lambda: engine.counts.cancelled == 2 and engine.running + engine.queued == 0)
    assert engine.counts.finished == engine.counts.failed == 0


def test_a_race_is_shown_on_one_clock(model: DemoModel) -> None:
    """Whatever the order in which the engine serves them: nobody is shown ahead of the slower one's clock."""

    def run(number: int, *seconds: float, end: float | None = None) -> Run:
        made = Run(request, number, 0)
        zero = torch.zeros(1)
        made.events.extend(Partial(zero, zero, Glance(1, 1, s)) for s in seconds)
        if end is not None:
            made.events.append(Finished(None, zero, zero, 1, 1, end, 0.0))  # type: ignore[arg-type]
            made.over = True
        return made

    def due(*runs: Run, together: bool = True) -> list[tuple[int, float]]:
        return [(r.number, module._seconds(event)) for r, event in module._due(list(runs), together)]

    request: Request = request_of(model, "red heart", "ar", "scd")
    first, second = run(0, 0.1, 0.2, 0.3), run(1)
    assert due(first, second) == []  # the second has not begun
    second.events.append(Partial(torch.zeros(1), torch.zeros(1), Glance(1, 1, 0.25)))
    assert due(first, second) == [(0, 0.2), (1, 0.25)] and len(first.events) == 1
    assert due(run(0, 0.1), run(1, end=0.5)) == [(0, 0.1)]  # done, but not by this clock
    assert due(run(0, 0.1, 0.9), run(1, end=0.5)) == [(1, 0.5), (0, 0.9)]  # who is done holds up nobody
    assert due(run(0, end=0.9), run(1, end=0.5)) == [(1, 0.5), (0, 0.9)]
    assert due(run(0, 0.1, 0.9), run(1), together=False) == [(0, 0.9)]
