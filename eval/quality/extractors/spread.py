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


class Spread(Extractor):
    """The extractor that `make` gives, and `workers` copies of it on the cluster that this process is connected to.

    Batches go to the workers in turn and their features come back in order, so results are those of one process. Ray
    starts a worker that dies again, with its batches. Captions are read here.
    """

    def __init__(self, make: Callable[[], Extractor], workers: int, device: str = "auto"):
        ray = ray_module()
        self._here = own = make()
        self.name, self.weights, self.resize, self.versions = own.name, own.weights, own.resize, own.versions
        kind = ray.remote(max_restarts=-1, max_task_retries=-1, **devices(ray, device))(_Copy)
        self._workers = [kind.remote(make, own.weights) for _ in range(workers)]

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        return self._here.extract(images)

    def each(self, batches: Iterable[Tensor]) -> Iterator[dict[str, Tensor]]:
        ray, flying = ray_module(), deque[Any]()
        for worker, images in zip(cycle(self._workers), batches, strict=False):
            if len(flying) == AHEAD * len(self._workers):
                yield ray.get(flying.popleft())
            flying.append(worker.features.remote(images))
        while flying:
            yield ray.get(flying.popleft())

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            ray_module().kill(worker)

    def texts(self, captions: list[str]) -> Tensor:
        """Features of captions, of an extractor that has them."""
        found: Tensor = self._here.texts(captions)  # type: ignore[attr-defined]
        return found


class _Copy:
    """One copy; an actor."""

    def __init__(self, make: Callable[[], Extractor], weights: str):
        self._own = make()
        if self._own.weights != weights:
            raise VisarError(f"A worker has other weights of {self._own.name}.")

    def features(self, images: Tensor) -> dict[str, Tensor]:
        return self._own(images)
