"""What the tests of the demo say to its server over HTTP, as a browser does and as none would."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from tests.helpers.stepped import LONG
from visar.cli import main
from visar.serving.engine import Engine

JSON = {"Content-Type": "application/json"}


@contextmanager
def serving(model: object, *options: str) -> Iterator[str]:
    """The address of a page that the command serves in this process."""
    import gradio

    launched: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setattr(gradio.Blocks, "block_thread", lambda page: launched.append(page))
        with pytest.MonkeyPatch.context() as running:  # the command ends at once, and the server goes on
            running.setattr(Engine, "close", lambda engine, **_: launched.append(engine))
            assert main(["demo", "--port", "0", "--dtype", "float32", "--model", str(model), *options]) == 0
        page, engine = launched
        try:
            yield str(page.local_url).rstrip("/")
        finally:
            page.close(verbose=False)
            assert engine.close(drain=False, timeout=LONG)


def ask(
    url: str, method: str = "", body: bytes | None = None, headers: dict[str, str] | None = None, source: str = ""
) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers of an answer to a request that comes from the address `source`."""
    parts = urlsplit(url)
    own = (source, 0) if source else None
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=LONG, source_address=own)
    try:
        path = url.partition(parts.netloc)[2] or "/"
        connection.request(method or ("GET" if body is None else "POST"), path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read(), {k.lower(): v for k, v in answer.getheaders()}
    finally:
        connection.close()


def get(url: str, **options: Any) -> tuple[int, bytes]:
    """Status and body."""
    return ask(url, **options)[:2]


@contextmanager
def canary() -> Iterator[tuple[str, list[str]]]:
    """The address of a server that nobody must ask, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"sung")

        do_HEAD = do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


class Visitor:
    """What a browser sends and is sent, without one."""

    def __init__(self, address: str, session: str, source: str = ""):
        self.api, self.session, self.source = f"{address}/gradio_api", session, source
        self.config = json.loads(get(f"{address}/config")[1])
        self.components = {c["id"]: c for c in self.config["components"]}

    def button(self, name: str) -> Any:
        """The event of a button by its id."""
        (own,) = (c["id"] for c in self.components.values() if c["props"].get("elem_id") == name)
        (event,) = (d for d in self.config["dependencies"] if [own, "click"] in d["targets"])
        return event

    def values(self, event: Any, **values: Any) -> list[Any]:
        """What the boxes of an event hold; as the page has them, but for `values` by their labels.

        A seed that is given is not random.
        """
        values |= {"Random seed": False} if "Seed" in values else {}
        boxes = [self.components[number]["props"] for number in event["inputs"]]
        return [values.get(str(b.get("label")), b.get("value")) for b in boxes]

    def press(self, button: str, **values: Any) -> Any:
        """Press a button by its id: what a quick one answers, nothing from one that waits."""
        event = self.button(button)
        route = "queue/join" if event["queue"] else "run/predict"
        return self._send(route, event, self.values(event, **values)).get("data")

    def answer(self, button: str, **values: Any) -> str:
        """The status that a request ends with."""
        self.press(button, **values)
        return str(self.results()[0])

    def messages(self, kind: str) -> Iterator[list[Any]]:
        """What the page is sent of one kind, as it comes."""
        parts = urlsplit(self.api)
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=LONG)
        try:
            connection.request("GET", f"{parts.path}/queue/data?session_hash={self.session}")
            for line in connection.getresponse():
                if line.startswith(b"data:") and (said := json.loads(line[5:]))["msg"] == kind:
                    assert said["success"], said
                    yield said["output"]["data"]
        finally:
            connection.close()

    def results(self) -> list[Any]:
        """What the next request of this visitor ends with."""
        return next(self.messages("process_completed"))

    def sends(self, route: str, event: Any, data: list[Any]) -> tuple[int, bytes]:
        """Status and body of the answer to a press."""
        body = {"data": data, "fn_index": event["id"], "session_hash": self.session}
        return get(f"{self.api}/{route}", body=json.dumps(body).encode(), headers=JSON, source=self.source)

    def _send(self, route: str, event: Any, data: list[Any]) -> Any:
        status, answer = self.sends(route, event, data)
        assert status == 200, answer
        return json.loads(answer)


def image_in(page: str) -> bytes:
    """The pixels of the first PNG."""
    found = re.search(r"data:image/png;base64,([^\"]+)", page)
    assert found, page[:200]
    return Image.open(io.BytesIO(base64.b64decode(found[1]))).tobytes()
