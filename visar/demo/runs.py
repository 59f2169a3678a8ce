"""Visitors' requests as jobs of the engine: their images while they are decoded, on one clock, until a stop."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from visar.demo.models import DemoModel
from visar.demo.requests import Limits, Request
from visar.generation import pool
from visar.generation.pool import Finished, Glance
from visar.generation.progress import Progress, to_pil
from visar.samplers import get_sampler
from visar.serving.engine import Engine
from visar.serving.jobs import Event, Failed, Job, Partial

EVERY = 0.2  # seconds between two images of a run
WARM = 3  # passes at the start of the server: packing weights and first launches are not a visitor's


class Stopped(Exception):
    """The visitor's request was stopped."""


@dataclass(frozen=True)
class Frame:
    """A run as it is shown: what the engine told last, and its pixels."""

    image: Image.Image
    event: Partial | Finished

    @property
    def at(self) -> Glance:
        done = self.event
        return done.at if isinstance(done, Partial) else Glance(len(done.commit_pass), done.passes, done.seconds)

    @property
    def finished(self) -> Finished | None:
        return self.event if isinstance(self.event, Finished) else None


@dataclass(eq=False)
class Run:
    """Image `image` of a request, made with its sampler number `number`."""

    request: Request
    number: int
    image: int
    at: Glance = field(default_factory=lambda: Glance(0, 0, 0.0))  # after the last pass
    frame: Frame | None = None  # what is shown of it
    events: deque[Partial | Finished] = field(default_factory=deque)  # what is not shown yet
    over: bool = False  # decoded, if not shown yet
    _told: float = 0.0

    @property
    def done(self) -> bool:
        return self.frame is not None and self.frame.finished is not None

    def watch(self, now: Glance) -> bool:
        """Whether the engine shall copy the tokens after this pass."""
        self.at = now
        if time.monotonic() - self._told < EVERY:
            return False
        self._told = time.monotonic()
        return True

    def paint(self, event: Partial | Finished) -> None:
        """Decode the pixels of an event, which becomes the frame."""
        model, tokens, commit_pass = self.request.model.model, event.tokens[None], event.commit_pass[None]
        if isinstance(event, Finished):
            self.frame = Frame(to_pil(model.decode_tokens(tokens))[0], event)
            return
        at, lengths, known = event.at, torch.tensor([event.at.committed]), commit_pass >= 0
        seen = Progress(at.passes, at.seconds, tokens, commit_pass, lengths, known, model.family)
        self.frame = Frame(seen.images()[0], event)


class Runs:
    """The requests of all visitors on one engine. Pixels are decoded in a thread beside that of the engine."""

    def __init__(self, engine: Engine, limits: Limits):
        self.engine, self.limits = engine, limits
        self._painter = ThreadPoolExecutor(1, "visar pixels")
        self._stops: dict[str, Any] = {}  # by visitor

    def warm(self, models: list[DemoModel]) -> None:
        """Run some passes of each model's default sampler, in the background."""
        for model in models:
            sampler = get_sampler(model.default_sampler, **model.parameters(model.default_sampler))
            condition = 0 if model.classes else "a heart"
            passes: list[Job] = []

            def enough(now: Glance, passes: list[Job] = passes) -> bool:
                if now.passes >= WARM:
                    passes[0].cancel()
                return False

            passes.append(Job(model.model, sampler, pool.Request(condition), lambda _: None, enough))
            self.engine.submit(passes[0])

    def stop(self, visitor: str) -> bool:
        """Stop a visitor's request; whether there was one."""
        if (found := self._stops.get(visitor)) is not None:
            found()
        return found is not None

    async def serve(self, visitor: str, request: Request) -> AsyncIterator[list[Run]]:
        """The runs of a request, sampler by sampler, each time that something new is to be shown.

        Raises `Stopped`, a `VisarError` where the engine takes no more, and what a run fails with.
        """
        loop, news = asyncio.get_running_loop(), asyncio.Queue[tuple[Run | None, Event | None]]()
        runs = [Run(request, n, i) for n in range(len(request.samplers)) for i in range(request.images)]
        jobs = [self._job(run, loop, news) for run in runs]

        def stop() -> None:
            loop.call_soon_threadsafe(news.put_nowait, (None, None))

        self.engine.submit_all(jobs)
        self._stops[visitor] = stop
        try:
            while not all(run.done for run in runs):
                new = [await news.get()]
                while not news.empty():
                    new.append(news.get_nowait())
                for run, event in new:
                    if run is None:
                        raise Stopped(_stopped(runs))
                    if isinstance(event, Failed):
                        raise event.error
                    if isinstance(event, Partial | Finished):
                        run.events.append(event)
                        run.over = isinstance(event, Finished)
                for run, event in _due(runs, together=len(request.samplers) > 1):
                    await loop.run_in_executor(self._painter, run.paint, event)
                yield runs
        finally:
            for job in jobs:
                job.cancel()
            if self._stops.get(visitor) is stop:
                del self._stops[visitor]

    def _job(self, run: Run, loop: asyncio.AbstractEventLoop, news: asyncio.Queue[Any]) -> Job:
        def tell(event: Event) -> None:
            with suppress(RuntimeError):  # the server has closed its loop
                loop.call_soon_threadsafe(news.put_nowait, (run, event))

        request = run.request
        wanted = pool.Request(request.condition, request.params, run.image)
        deadline = time.monotonic() + self.limits.seconds
        return Job(request.model.model, request.samplers[run.number], wanted, tell, run.watch, deadline)


def _due(runs: list[Run], together: bool) -> list[tuple[Run, Partial | Finished]]:
    """The newest event of each run that may be shown.

    Samplers that race are shown `together`, on one clock: that of the one whose own passes have taken least time so
    far. The engine gives them turns, or one after the other, so the order in which they end says nothing.
    """
    clock = min((_clock(run) for run in runs if not run.over), default=float("inf")) if together else float("inf")
    found = []
    for run in runs:
        event = None
        while run.events and _seconds(run.events[0]) <= clock:
            event = run.events.popleft()
        if event is not None:
            found.append((run, event))
    return sorted(found, key=lambda pair: _seconds(pair[1]))


def _clock(run: Run) -> float:
    if run.events:
        return _seconds(run.events[-1])
    return 0.0 if run.frame is None else run.frame.at.seconds


def _seconds(event: Partial | Finished) -> float:
    return event.at.seconds if isinstance(event, Partial) else event.seconds


def _stopped(runs: list[Run]) -> str:
    passes = max(run.at.passes for run in runs)
    return f"Stopped after {passes} pass{'' if passes == 1 else 'es'}." if passes else "Stopped before it began."
