"""What the tests of the demo share: requests, what a model itself makes of them, and an engine that waits."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from visar.demo.models import DemoModel
from visar.demo.requests import Limits, Request, checked
from visar.demo.runs import Run, Runs
from visar.serving.engine import Engine

LONG = 600  # seconds until a test gives up waiting, on however busy a machine; nothing is measured by it


@contextmanager
def held(passes: int = 0) -> Iterator[threading.Event]:
    """In this block engines wait after `passes` of their pools' turns until the event is set, as it is at the end."""
    go, left, turn = threading.Event(), [passes], Engine._turn

    def waits(engine: Engine) -> None:
        if any(pool.rows for pool in engine._pools.values()) or engine._line:
            left[0] -= 1
            while left[0] < 0 and not go.wait(0.02):
                engine._drop()  # who leaves is let go
        turn(engine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_turn", waits)
        try:
            yield go
        finally:
            go.set()


def request_of(model: DemoModel, prompt: str = "red heart", *samplers: str, **values: Any) -> Request:
    settings: Any = dict(seed=0, guidance_scale=2.0, guidance_schedule="linear", temperature=1.0, top_k=0, top_p=1.0)
    settings |= {name: values.pop(name) for name in settings if name in values}
    chosen = [(s, {"steps": 4, "head_steps": 6, "window": 6}) for s in samplers or ("ar",)]
    given: Any = dict(label=3, images=1) | values
    return checked(model, prompt, samplers=chosen, settings=settings, limits=Limits(), **given)


def served(engine: Engine, request: Request) -> list[Run]:
    """The finished runs of a request."""

    async def all_of_them() -> list[Run]:
        shown = [list(runs) async for runs in Runs(engine, Limits()).serve("me", request)]
        return shown[-1]

    return asyncio.run(all_of_them())


def alone(request: Request, number: int = 0) -> Any:
    """What the model itself makes of a request."""
    return request.model.model.generate(
        request.condition, sampler=request.samplers[number], num_images=request.images, params=request.params
    )


def assert_same(runs: list[Run], out: Any) -> None:
    """The finished runs of a sampler have the images of the model alone."""
    for i, run in enumerate(runs):
        frame = run.frame
        assert frame is not None and frame.finished is not None
        assert frame.image.tobytes() == out.images[i].tobytes() and frame.finished.tokens.equal(out.tokens[i])
        assert frame.event.commit_pass.equal(out.commit_pass[i])


def until(condition: Callable[[], Any]) -> None:
    """Wait for what another thread is about to do."""
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def hears_interrupts() -> None:
    """Run in a new process: a shell's background jobs, and what they start, would ignore ^C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
