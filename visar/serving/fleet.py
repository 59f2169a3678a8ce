"""The HTTP side over engines in other processes, by Ray Serve: one front, and a replica of the models for each GPU.

The front sends every image of a request to an engine of its own choice. An engine that dies loses nothing: the front
asks another one for the images that are not done. An image depends on its request alone, so it comes out the same.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from visar.errors import VisarError
from visar.serving.engine import Engine
from visar.serving.jobs import Busy, Closed, Late
from visar.serving.replica import LONGEST_WAIT, Replica, Served
from visar.serving.wanted import Accepted, Broken, Made, ModelCard, Preview, Told, Wanted

DEATHS = 5  # of engines, that an image outlives
PAUSE = 0.5  # seconds before another engine is asked


@dataclass(frozen=True)
class Settings:
    """What a fleet and its engines are told: the options of `visar serve`, `replicas` from the least to the most."""

    rows: int = 8
    waiting: int = 64
    replicas: tuple[int, int] = (1, 1)
    device: str = "auto"
    most_images: int = 10
    deadline: float = 600
    drain: float = 30
    keys: Sequence[str] = field(default=(), repr=False)
    bound: str = "127.0.0.1"
    allowed_hosts: Sequence[str] = ()


class EngineReplica:
    """The models of one process; a deployment of Ray Serve."""

    def __init__(self, load: Callable[[], Iterable[Served]], settings: Settings):
        # The front keeps the line, so an engine takes what it has rows for; others wait where they can go elsewhere.
        self._own = Replica(load(), Engine(rows=settings.rows, waiting=settings.rows))
        self._drain = settings.drain

    async def cards(self) -> Mapping[str, ModelCard]:
        return self._own.cards

    async def images(self, wanted: Wanted) -> AsyncGenerator[Told, None]:
        async with aclosing(self._own.images(wanted)) as told:
            async for one in told:
                yield one

    async def process(self) -> int:
        """Its number in the operating system."""
        import os

        return os.getpid()

    async def check_health(self) -> None:
        """For Ray Serve, which replaces an engine that raises."""
        if problem := self._own.problem:
            raise RuntimeError(problem)

    async def __del__(self) -> None:
        await asyncio.to_thread(self._own.close, self._drain)


@dataclass
class Fleet:
    """A `Studio` of all replicas of `engines`, a handle of Ray Serve."""

    engines: Any
    settings: Settings
    cards: Mapping[str, ModelCard] = field(default_factory=dict)
    asked_again: int = 0  # times that an image went to another engine
    _at_work: int = 0
    _deaths: int = 0  # of engines, one after another, at one image
    _usual: float = 1.0  # seconds of an image

    async def look(self) -> None:
        """Learn what the engines serve, as soon as there is one."""
        while not self.cards:
            try:
                self.cards = await self.engines.cards.remote()
            except Exception as error:
                if not _is_death(error):
                    raise
                await asyncio.sleep(PAUSE)

    @property
    def capacity(self) -> int:
        return self.settings.replicas[1] * self.settings.rows

    @property
    def retry_after(self) -> int:
        rounds = 1 + max(0, self._at_work - self.capacity) / self.capacity
        return max(1, min(LONGEST_WAIT, math.ceil(self._usual * rounds)))

    @property
    def problem(self) -> str:
        return f"{self._deaths} engines died one after another." if self._deaths > DEATHS else ""

    @property
    def ready(self) -> bool:
        return bool(self.cards) and not self.problem

    async def images(self, wanted: Wanted) -> AsyncGenerator[Told, None]:
        """As `Studio.images`."""
        if self._at_work + len(wanted.images) > self.capacity + self.settings.waiting:
            raise Busy("Too many requests are waiting; try again in a while.")
        self._at_work += len(wanted.images)
        told: asyncio.Queue[Told | BaseException] = asyncio.Queue(2 * len(wanted.images))
        tasks = [asyncio.ensure_future(self._into(told, replace(wanted, images=(image,)))) for image in wanted.images]
        try:
            accepted, left = False, len(tasks)
            while left:
                one = await told.get()
                if isinstance(one, BaseException):
                    raise one
                left -= isinstance(one, Made)
                if not isinstance(one, Accepted) or not accepted:
                    yield one
                accepted |= isinstance(one, Accepted)
        finally:
            self._at_work -= len(tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _into(self, told: asyncio.Queue[Told | BaseException], wanted: Wanted) -> None:
        """Put what is told of one image in the queue, or its error."""
        try:
            left = None if wanted.seconds == math.inf else wanted.seconds
            await asyncio.wait_for(self._image(told, wanted), left)
        except asyncio.TimeoutError:
            await told.put(Late("The image was not ready in time; ask again, or allow more time."))
        except Exception as error:
            await told.put(error)

    async def _image(self, told: asyncio.Queue[Told | BaseException], wanted: Wanted) -> None:
        began, previews = time.monotonic(), 0
        for attempt in range(1, DEATHS + 2):
            again = 0  # previews that an engine before it gave, too
            stream = self.engines.options(stream=True).images.remote(wanted)
            try:
                async for one in stream:
                    if isinstance(one, Preview):
                        again += 1
                        if again <= previews:
                            continue
                        previews = again
                    if isinstance(one, Made):
                        self._deaths, seconds = 0, time.monotonic() - began
                        self._usual += 0.2 * (one.seconds - one.waited - self._usual)
                        one = one._replace(waited=one.waited + seconds - one.seconds, seconds=seconds)
                    await told.put(one)
                return
            except Exception as error:
                if isinstance(cause := getattr(error, "cause", error), VisarError) and not isinstance(cause, Closed):
                    raise cause from None
                if not (isinstance(cause, Closed) or _is_death(error)):
                    raise
            finally:
                with suppress(Exception):
                    stream.cancel()
            self._deaths = max(self._deaths, attempt)
            self.asked_again += 1
            await asyncio.sleep(PAUSE)
        raise Broken(f"{DEATHS + 1} engines died while they made this image.")


def _is_death(error: BaseException) -> bool:
    """Whether an engine is gone or going, and another one may do better."""
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import RayServeException

    return isinstance(error, RayError | RayServeException) and not isinstance(error, RayTaskError)


class FleetCollector(Collector):
    """A front's counts, read when they are asked for."""

    def __init__(self, fleet: Fleet):
        self.fleet = fleet

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("visar_images_asked", "Images at work or in line", self.fleet._at_work)
        yield GaugeMetricFamily("visar_rows", "Rows of all engines at most", self.fleet.capacity)
        yield CounterMetricFamily(
            "visar_images_asked_again", "Times that an image went to another engine", self.fleet.asked_again
        )


class Front:
    """The HTTP API; a deployment of Ray Serve."""

    def __init__(self, engines: Any, settings: Settings):
        self._fleet, self._settings = Fleet(engines, settings), settings

    def __serve_build_asgi_app__(self) -> Any:
        from visar.serving.access import Access
        from visar.serving.app import build
        from visar.serving.gate import Keys
        from visar.serving.metrics import Metrics

        own, metrics = self._settings, Metrics()
        metrics.registry.register(FleetCollector(self._fleet))
        return build(
            self._fleet, access=Access(own.bound, own.allowed_hosts), keys=Keys(own.keys), metrics=metrics,
            most_images=own.most_images, deadline=own.deadline, start=self._fleet.look,
        )  # fmt: skip


def application(load: Callable[[], Iterable[Served]], settings: Settings) -> Any:
    """The application of Ray Serve: engines that each `load` the models, and a front. Needs a connection to Ray."""
    import ray
    from ray import serve

    from visar.cluster import devices

    least, most = settings.replicas
    scaling: dict[str, Any] = {"num_replicas": least}
    if most > least:
        # Of what is asked for, at work or in line, each replica is to have its rows.
        scaling = {"autoscaling_config": {
            "min_replicas": least, "max_replicas": most, "target_ongoing_requests": settings.rows,
        }}  # fmt: skip
    common: dict[str, Any] = {"graceful_shutdown_timeout_s": settings.drain + 10, "graceful_shutdown_wait_loop_s": 0.5}
    engines = serve.deployment(
        name="Engine", max_ongoing_requests=settings.rows, ray_actor_options=devices(ray, settings.device),
        health_check_period_s=5, **scaling, **common,
    )(EngineReplica).bind(load, settings)  # fmt: skip
    # One front: it keeps the line, and decides who is refused.
    front = serve.deployment(
        name="Front", num_replicas=1, max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0}, **common
    )(serve.ingress()(Front))
    return front.bind(engines, settings)
