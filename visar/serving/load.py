"""A server under load: clients in a closed loop and Poisson arrivals, against static batches and one image at a time.

All three make the same images, with the same model and sampler, in one process and one run. The server is asked over
HTTP; the other two are called directly, which is in their favour.
"""

from __future__ import annotations

import http.client
import json
import queue
import random
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from visar.eval.benchmark.speed import device_title
from visar.eval.prompts import conditions
from visar.generation.model import ImageModel
from visar.host import resident_memory
from visar.serving.access import Access
from visar.serving.app import ROUTE, build
from visar.serving.engine import Engine
from visar.serving.replica import Replica, Served
from visar.serving.server import Server

CLIENTS = (1, 8, 32)
LOADS = (0.5, 0.9)  # of the capacity that the server has in this run
NAME, LABEL = "model", "sampler"

Client = Callable[[Callable[[int], None]], None]  # is given what asks for an image by its number


class Times(NamedTuple):
    """Seconds of an image, and until its first partial image, if there was one."""

    seconds: float
    first: float | None = None


class System(Protocol):
    """Something that makes images for clients."""

    name: str

    def ask(self, number: int) -> Times:
        """Image `number`; blocks."""

    def passes(self) -> tuple[int, int]:
        """Row-passes of images, and of all rows, so far."""


@dataclass(frozen=True)
class LoadRow:
    """One system under one load. `idle` is the share of row-passes in which a row made no image."""

    system: str
    load: str
    images: int
    images_per_second: float
    p50: float
    p99: float
    first_partial: float | None
    idle: float


@dataclass(frozen=True)
class Soak:
    """Resident memory in MiB before and after a time at full load."""

    minutes: float
    images: int
    before: float
    after: float


@dataclass(frozen=True)
class LoadReport:
    """`capacity` in images per second, that of the server with the most clients."""

    device: str
    dtype: str
    sampler: str
    rows: int
    capacity: float
    table: list[LoadRow]
    soak: Soak | None


class OverHttp:
    """A server of this process, asked over a socket, with one partial image."""

    name = "serve"

    def __init__(self, port: int, engine: Engine, bodies: Callable[[int], Mapping[str, Any]]):
        self.port, self.engine, self.bodies = port, engine, bodies

    def ask(self, number: int) -> Times:
        start = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        body = json.dumps({**self.bodies(number), "stream": True, "partial_images": 1})
        connection.request("POST", ROUTE, body, {"Content-Type": "application/json"})
        answer, first, done = connection.getresponse(), None, False
        for line in answer:
            if line.startswith(b"event: image_generation.partial_image"):
                first = time.perf_counter() - start
            done |= line.startswith(b"event: image_generation.completed")
        connection.close()
        if not done:
            raise RuntimeError(f"The server gave no image (status {answer.status}).")
        return Times(time.perf_counter() - start, first)

    def passes(self) -> tuple[int, int]:
        return self.engine.counts.row_passes, self.engine.counts.places


class Batches:
    """A queue and a call of the model for all that wait, `size` at most: no image begins before the batch is done."""

    def __init__(self, name: str, size: int, generate: Callable[[list[int]], list[int]]):
        self.name, self.size, self.generate = name, size, generate
        self._waiting: queue.Queue[tuple[int, threading.Event] | None] = queue.Queue()
        self._used = self._all = 0
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def ask(self, number: int) -> Times:
        start, done = time.perf_counter(), threading.Event()
        self._waiting.put((number, done))
        while not done.wait(1):
            if not self._thread.is_alive():
                raise RuntimeError("The batches ended.")
        return Times(time.perf_counter() - start)

    def passes(self) -> tuple[int, int]:
        return self._used, self._all

    def close(self) -> None:
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch = [first]
            while len(batch) < self.size and not self._waiting.empty():
                if (more := self._waiting.get()) is None:
                    return
                batch.append(more)
            passes = self.generate([number for number, _ in batch])
            self._used += sum(passes)
            self._all += len(passes) * max(passes)
            for _, done in batch:
                done.set()


def measure_load(
    model: Any, sampler: Any = None, *, rows: int = 8, images: int = 24, minutes: float = 0.5,
    clients: tuple[int, ...] | None = None, loads: tuple[float, ...] = LOADS, invariant: bool | None = None,
    **settings: Any,
) -> LoadReport:  # fmt: skip
    """Measure `images` images, or one for each client, in every combination; then a soak of `minutes`."""
    model = ImageModel.of(model)
    model.bar = {"disable": True}
    clients = CLIENTS if clients is None else clients
    method, prompts = model.sampler_of(sampler), conditions(model, max(images, *clients))
    field = "prompt" if model.family.condition == "prompt" else "class_label"
    seed = settings.pop("seed", 0)

    def body(number: int) -> Mapping[str, Any]:
        return {field: prompts[number % len(prompts)], "seed": seed + number, **settings}

    def generate(numbers: list[int]) -> list[int]:
        out = model.generate(
            [prompts[n % len(prompts)] for n in numbers], sampler=method, seed=[seed + n for n in numbers],
            first_image=[0] * len(numbers), invariant=invariant, **settings,
        )  # fmt: skip
        return out.stats.passes_per_image

    table: list[LoadRow] = []
    with _server(model, method, rows, max(images, *clients), invariant, body) as server:
        static, single = Batches("static batches", rows, generate), Batches("one at a time", 1, generate)
        systems: list[System] = [server, static, single]
        for system in systems:
            _closed(system, 1, 1)  # what is done once
        _closed(static, rows, rows)
        for count in clients:
            table += [_closed(system, count, max(images, count)) for system in systems]
        capacity = next(r for r in table[-len(systems) :] if r.system == server.name).images_per_second
        for share in loads:
            table += [_poisson(system, share, capacity, images) for system in systems]
        soak = _soak(server, rows, minutes) if minutes else None
        static.close()
        single.close()
    dtype = str(model.dtype).removeprefix("torch.")
    return LoadReport(device_title(model.device), dtype, method.name, rows, capacity, table, soak)


@contextmanager
def _server(
    model: ImageModel, method: Any, rows: int, waiting: int, invariant: bool | None,
    bodies: Callable[[int], Mapping[str, Any]],
) -> Iterator[OverHttp]:  # fmt: skip
    engine, started = Engine(rows=rows, waiting=waiting), threading.Event()
    replica = Replica([Served(NAME, model, {LABEL: method}, invariant)], engine)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        server = Server(build(replica, access=Access("127.0.0.1")), lambda: replica.close(60), started.set)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        started.wait()
        try:
            yield OverHttp(port, engine, bodies)
        finally:
            server.end()
            thread.join()


def _closed(system: System, clients: int, images: int) -> LoadRow:
    """`clients` that ask for the next image as soon as they have one."""
    numbers = iter(range(images))
    lock = threading.Lock()

    def client(ask: Callable[[int], None]) -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            ask(number)

    return _row(system, f"{clients} client{'' if clients == 1 else 's'}", [client] * clients)


def _poisson(system: System, share: float, capacity: float, images: int) -> LoadRow:
    """Images that are asked for at random times, whether the last ones are done or not; the times are always alike."""
    chance, at = random.Random(0), 0.0
    clients: list[Client] = []
    for number in range(images):
        at += chance.expovariate(share * capacity)

        def client(ask: Callable[[int], None], at: float = at, number: int = number) -> None:
            time.sleep(at)
            ask(number)

        clients.append(client)
    return _row(system, f"Poisson {share:g}", clients)


def _row(system: System, load: str, clients: list[Client]) -> LoadRow:
    """Run all clients in threads of their own."""
    found: list[Times] = []
    errors: list[BaseException] = []

    def run(client: Client) -> None:
        try:
            client(lambda number: found.append(system.ask(number)))
        except BaseException as error:
            errors.append(error)

    before, start = system.passes(), time.perf_counter()
    threads = [threading.Thread(target=run, args=(client,), daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    seconds, after = time.perf_counter() - start, system.passes()
    every = sorted(times.seconds for times in found)
    firsts = [times.first for times in found if times.first is not None]
    return LoadRow(
        system.name, load, len(found), len(found) / seconds, statistics.median(every),
        every[min(len(every) - 1, int(0.99 * len(every)))], statistics.median(firsts) if firsts else None,
        1 - (after[0] - before[0]) / max(1, after[1] - before[1]),
    )  # fmt: skip


def _soak(system: OverHttp, clients: int, minutes: float) -> Soak:
    """All rows at work for a time."""
    end, before = time.monotonic() + 60 * minutes, resident_memory() / 2**20

    def client(ask: Callable[[int], None]) -> None:
        number = 0
        while time.monotonic() < end:
            ask(number)
            number += 1

    row = _row(system, "soak", [client] * clients)
    return Soak(minutes, row.images, before, resident_memory() / 2**20)
