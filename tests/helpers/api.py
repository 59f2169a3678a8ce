"""A server of `visar serve` in a thread of this process, and what its clients say to it over real sockets."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from visar.generation.model import ImageModel
from visar.generation.pool import Pool
from visar.serving.access import Access
from visar.serving.app import ROUTE, build
from visar.serving.engine import Engine
from visar.serving.gate import Keys
from visar.serving.metrics import EngineCollector, Metrics
from visar.serving.replica import Replica, Served
from visar.serving.server import Server

LONG = 120  # seconds until a test gives up, on however busy a machine; nothing is measured by it
JSON = {"Content-Type": "application/json"}

KEY = "a-key-of-a-client"


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        found = self.json["error"]
        assert set(found) == {"message", "type", "param", "code"} and found["message"].endswith(".")
        return found

    @property
    def files(self) -> list[bytes]:
        assert self.status == 200, self.body
        return [base64.b64decode(one["b64_json"]) for one in self.json["data"]]

    @property
    def events(self) -> list[dict[str, Any]]:
        """Of a stream; the name of each is its type."""
        assert self.status == 200, self.body
        found = []
        for block in self.body.decode().replace("\r\n", "\n").strip().split("\n\n"):
            lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
            if lines:
                found.append(json.loads(lines["data"]))
                assert found[-1]["type"] == lines["event"]
        return found


@dataclass
class Api:
    """A client of a server on a port of this machine."""

    port: int
    replica: Replica
    server: Server
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def engine(self) -> Engine:
        return self.replica.engine

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None, method: str = ""
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONG)
        try:
            connection.request(
                method or ("GET" if body is None else "POST"), path, body, {**self.headers, **(headers or {})}
            )
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def images(self, **body: Any) -> Answer:
        return self.ask(ROUTE, json.dumps(body).encode(), JSON)

    def later(self, **body: Any) -> Later:
        """`images` in a thread."""
        return Later(lambda: self.images(**body))

    def raw(self, *lines: str, body: bytes = b"", receive: int = 0) -> socket.socket:
        """A connection on which a request was sent, as it is; `receive` bounds what the kernel takes for its client."""
        made = socket.socket()
        if receive:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        made.settimeout(LONG)
        made.connect(("127.0.0.1", self.port))
        head = "\r\n".join([f"POST {ROUTE} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", *lines])
        made.sendall(head.encode() + b"\r\n\r\n" + body)
        return made

    def open(self, receive: int = 0, **body: Any) -> socket.socket:
        """A connection on which images were asked for."""
        text = json.dumps(body).encode()
        return self.raw(f"Content-Length: {len(text)}", body=text, receive=receive)


class Later:
    """An answer that is waited for in a thread."""

    def __init__(self, get: Callable[[], Answer]):
        self._found: list[Answer] = []
        self._thread = threading.Thread(target=lambda: self._found.append(get()), daemon=True)
        self._thread.start()

    @property
    def answer(self) -> Answer:
        self._thread.join(LONG)
        return self._found[0]


def until(true: Callable[[], Any]) -> None:
    """Wait for it."""
    end = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextmanager
def serving(
    *models: tuple[str, Any, tuple[str, ...]], rows: int = 3, waiting: int = 40, keys: tuple[str, ...] = (),
    drain: float = LONG, invariant: bool | None = None, **options: Any,
) -> Iterator[Api]:  # fmt: skip
    """A server of models by (name, pipeline, samplers)."""
    served = []
    for name, pipe, samplers in models:
        model = ImageModel.of(pipe)
        model.bar = {"disable": True}
        served.append(Served(name, model, {label: model.sampler_of(label) for label in samplers}, invariant))
    engine = Engine(rows=rows, waiting=waiting)
    replica, metrics = Replica(served, engine), Metrics()
    metrics.registry.register(EngineCollector(engine))
    replica.warm = True
    app = build(replica, access=Access("127.0.0.1"), keys=Keys(keys), metrics=metrics, **options)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = Server(app, lambda: replica.close(drain))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        until(lambda: server.started)
        try:
            yield Api(listener.getsockname()[1], replica, server)
        finally:
            server.should_exit = True
            engine.close(drain=False, timeout=LONG)
            thread.join(LONG)
            assert not thread.is_alive()


class Held:
    """Passes of pools that are let go one by one."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self._go, step = threading.Semaphore(0), Pool.step
        self.steps = 0  # that were begun

        def held(pool: Pool) -> Any:
            if pool.rows:
                self.steps += 1
                assert self._go.acquire(timeout=LONG)
            return step(pool)

        patch.setattr(Pool, "step", held)

    def go(self, passes: int = 10**6) -> None:
        self._go.release(passes)


def bearer(key: str) -> dict[str, str]:
    return {**JSON, "Authorization": f"Bearer {key}"}
