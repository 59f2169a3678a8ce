"""Bulk sampling on Ray: workers on any machines pull ids, and what a dead one had goes back to the others."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from visar.bulk.about import weights_mark
from visar.bulk.work import Made, Work, made, units
from visar.cluster import connected, devices, workers_of
from visar.errors import NotInTraining, VisarError
from visar.generation.model import ImageModel

DEATHS = 3  # of workers, one after another, without an image in between
AHEAD = 32  # images of a worker that may wait for the process that writes them; more make the worker wait
QUIET = 60.0  # seconds without an image, after which a word says why that may be
WAITING = (
    f"No image for {QUIET:.0f} seconds: workers load their models, or wait for room beside other applications of the "
    "Ray cluster."
)


@dataclass(frozen=True)
class Crew:
    """`workers` actors on the cluster at `address`, as `visar.cluster.connected` takes it; each calls `load`.

    By default there is a worker for each GPU, or one. The process that calls it writes the folder; a worker that dies
    is replaced.
    """

    load: Callable[[], ImageModel]
    workers: int | None = None
    address: str | None = None
    device: str = "auto"

    def __call__(self, work: Work) -> Made:
        """Images as they are done, in any order. Raises `VisarError` as a worker does, and if workers keep dying."""
        with connected(self.address) as ray:
            count = workers_of(ray, self.workers, self.device)
            yield from _Run(ray, self, work, devices(ray, self.device)).images(count)


class Ids:
    """The units of a run, and who has which; an actor."""

    def __init__(self, every: list[list[int]]):
        self._left = deque(every)
        self._taken: dict[int, list[list[int]]] = {}

    def take(self, worker: int) -> list[int] | None:
        """The next unit for a worker; None if there is none."""
        if not self._left:
            return None
        self._taken.setdefault(worker, []).append(unit := self._left.popleft())
        return unit

    def lost(self, worker: int, done: set[int]) -> None:
        """The worker is dead: what it had comes first, unless its images are `done`."""
        self._left.extendleft(unit for unit in self._taken.pop(worker, []) if not done.issuperset(unit))

    def left(self) -> int:
        return len(self._left)


class Worker:
    """A process that makes images; an actor. `mark` and `dtype` are those of the run's weights."""

    def make(
        self, load: Callable[[], ImageModel], work: Work, mark: str, dtype: str, ids: Any, worker: int
    ) -> Iterator[Any]:
        """The images of units that are taken as there is room, until there are none."""
        import ray

        warnings.simplefilter("ignore", NotInTraining)
        model = load()
        model.bar = {"disable": True}
        if (own := (weights_mark(model), str(model.dtype))) != (mark, dtype):
            raise VisarError(f"A worker has other weights, or another dtype, than the run: {own[1]} and {dtype}.")
        yield from made(replace(work, model=model), iter(lambda: ray.get(ids.take.remote(worker)), None))


class _Run:
    """One run: its actors, and the streams of images that they give."""

    def __init__(self, ray: Any, crew: Crew, work: Work, resources: dict[str, int]):
        self.ray, self.work = ray, work
        self.ids = ray.remote(num_cpus=0)(Ids).remote(units(work))
        bare: Any = replace(work, model=cast(Any, None))
        arguments = crew.load, bare, weights_mark(work.model), str(work.model.dtype)
        self._arguments = [ray.put(argument) for argument in arguments]
        self._kind = ray.remote(**resources)(Worker)
        self._actors: dict[int, Any] = {}
        self._streams: dict[Any, int] = {}  # to the number of its worker
        self._started = 0

    def images(self, count: int) -> Made:
        ray, done, deaths, told = self.ray, set(self.work.done), 0, False
        try:
            for _ in range(count):
                self._start()
            while self._streams:
                ready, _ = ray.wait(list(self._streams), num_returns=1, timeout=None if told else QUIET)
                if not ready:
                    told = True
                    warnings.warn(WAITING, stacklevel=2)
                    continue
                (stream,) = ready
                worker = self._streams[stream]
                try:
                    image, line = ray.get(next(stream))
                except StopIteration:
                    del self._streams[stream]
                    continue
                except ray.exceptions.RayTaskError as error:
                    raise error.cause if isinstance(error.cause, VisarError) else error from None
                except ray.exceptions.RayError as error:  # the actor, its machine, or the image on its way
                    if (deaths := deaths + 1) > DEATHS:
                        raise VisarError(
                            f"{deaths} workers died one after another: {str(error).rstrip('.')}."
                        ) from error
                    warnings.warn("A worker died; another one takes over its images.", stacklevel=2)
                    del self._streams[stream]
                    ray.kill(self._actors.pop(worker))
                    ray.get(self.ids.lost.remote(worker, done))
                    self._start()
                    continue
                deaths = 0
                done.add(int(line["id"]))
                yield image, line
        finally:
            for actor in (*self._actors.values(), self.ids):
                ray.kill(actor)

    def _start(self) -> None:
        worker, self._started = self._started, self._started + 1
        self._actors[worker] = self._kind.remote()
        make = self._actors[worker].make.options(num_returns="streaming", _generator_backpressure_num_objects=AHEAD)
        stream = make.remote(*self._arguments, self.ids, worker)
        self._streams[stream] = worker
