"""An extractor whose copies work on the machines of a Ray cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle
from typing import Any

from torch import Tensor

from visar.cluster import devices, ray_module
from visar.errors import VisarError
from visar.eval.quality.extractors.base import Extractor

AHEAD = 2  # batches on their way to each worker
DEATHS = 3  # of a worker


class Spread(Extractor):
    """The extractor that `make` gives, and `workers` copies of it on the cluster that this process is connected to.

    Batches go to the workers in turn and their features come back in order, so results are those of one process. Ray
    starts a worker that dies again, with its batches, `DEATHS` times; then it is a `VisarError`, as a worker's own are.
    Captions are read here.
    """

    def __init__(self, make: Callable[[], Extractor], workers: int, device: str = "auto"):
        ray = ray_module()
        self._here = own = make()
        self.name, self.weights, self.resize, self.versions = own.name, own.weights, own.resize, own.versions
        kind = ray.remote(max_restarts=DEATHS, max_task_retries=DEATHS, **devices(ray, device))(_Copy)
        self._workers = [kind.remote(make, own.weights) for _ in range(workers)]

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        return self._here.extract(images)

    def each(self, batches: Iterable[Tensor]) -> Iterator[dict[str, Tensor]]:
        flying = deque[Any]()
        for worker, images in zip(cycle(self._workers), batches, strict=False):
            if len(flying) == AHEAD * len(self._workers):
                yield _result(flying.popleft())
            flying.append(worker.features.remote(images))
        while flying:
            yield _result(flying.popleft())

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            ray_module().kill(worker)

    def texts(self, captions: list[str]) -> Tensor:
        """Features of captions, of an extractor that has them."""
        found: Tensor = self._here.texts(captions)  # type: ignore[attr-defined]
        return found


def _result(reference: Any) -> dict[str, Tensor]:
    ray = ray_module()
    try:
        found: dict[str, Tensor] = ray.get(reference)
        return found
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, VisarError) else error from None
    except ray.exceptions.RayError as error:
        raise VisarError(f"A worker of the Ray cluster died: {str(error).strip().splitlines()[-1]}") from error


class _Copy:
    """One copy; an actor."""

    def __init__(self, make: Callable[[], Extractor], weights: str):
        self._own = make()
        if self._own.weights != weights:
            raise VisarError(f"A worker has other weights of {self._own.name}.")

    def features(self, images: Tensor) -> dict[str, Tensor]:
        return self._own(images)
