"""Seeded random requests to the demo over a real socket: bodies, headers, methods and routes.

No request may end in an HTTP 5xx, make the server ask another one, or leave much in its memory; the server draws an
image afterwards. `VISAR_FUZZ=N` sends N requests, and `VISAR_FUZZ_SEED` takes another seed.
"""

from __future__ import annotations

import gzip
import http.client
import json
import os
import random
import re
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.helpers.stepped import LONG
from tests.helpers.web import Visitor, canary, image_in, serving

pytestmark = pytest.mark.slow

COUNT = int(os.environ.get("VISAR_FUZZ", "2500"))
SEED = int(os.environ.get("VISAR_FUZZ_SEED", "0"))
SECONDS = 40.0
GROWTH = 96  # MB
ROUTES = [
    "run/predict", "queue/join", "api/predict", "call/predict", "call/v2/predict", "cancel", "reset", "upload",
    "component_server", "stream/0", "stream/0/close", "process_recording", "vibe-edit", "undo-vibe-edit", "file=",
    "proxy=", "info", "openapi.json", "queue/status", "queue/data", "startup-events", "login_check", "token", "runs",
    "run-history/connect", "deep_link", "upload_progress", "dev/reload", "mcp/sse", "custom_component/0/client/a/b.js",
]  # fmt: skip
PATHS = ["/", "/config", "/theme.css", "/assets/", "/static/", "/login", "/monitoring", "/svelte/", "/pwa_icon/9999999"]
METHODS = ["GET", "HEAD", "POST", "POST", "POST", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "BREW"]
BITS = ["..", "%2e%2e", "/", "//", "%00", "\\", "etc/passwd", "%ff", ";", "?deep_link=../x", "?session_hash=a", "é"]


class Fuzzer:
    """Requests made at random from what a browser sends."""

    def __init__(self, seed: int, visitor: Visitor, elsewhere: str):
        self.rng, self.visitor, self.elsewhere = random.Random(seed), visitor, elsewhere

    def value(self, depth: int = 0) -> Any:
        pick = self.rng.choice
        file = {"path": f"{self.elsewhere}/{self.rng.random()}", "meta": {"_type": "gradio.FileData"}}
        plain = [
            None, True, False, 0, -1, 1, 0.5, 1e308, -1e-320, 2**31, 2**63, 10**400, "", "x", "ar", "icons", "a.py:B",
            "\ud800", "\x00", "x" * self.rng.randrange(5000), self.elsewhere, "../../etc/passwd", file, [file],
            {"__type__": "update", "value": file}, {"url": self.elsewhere, "path": "/etc/passwd"}, [], {},
        ]  # fmt: skip
        if depth < 4 and self.rng.random() < 0.2:
            inner = [self.value(depth + 1) for _ in range(self.rng.randrange(3))]
            return pick([inner, {pick(["path", "url", "value", "meta", "_type"]): v for v in inner}])
        return pick(plain)

    def body(self) -> bytes:
        rng = self.rng
        event = rng.choice(self.visitor.config["dependencies"])
        data = self.visitor.values(event)
        for _ in range(rng.randrange(4)):
            if data and rng.random() < 0.8:
                data[rng.randrange(len(data))] = self.value()
            else:
                data.insert(rng.randrange(len(data) + 1), self.value())
        made: dict[str, Any] = {
            "data": data, "fn_index": event["id"], "session_hash": f"fuzz{rng.randrange(2000)}", "trigger_id": 1,
        }  # fmt: skip
        if rng.random() < 0.15:
            made[rng.choice(["data", "fn_index", "session_hash", "event_data", "event_id", "batched"])] = self.value()
        if rng.random() < 0.05:
            del made[rng.choice(list(made))]
        text = json.dumps(made).encode()
        if rng.random() < 0.1:
            text = bytearray(text)  # type: ignore[assignment]
            for _ in range(rng.randrange(1, 9)):
                text[rng.randrange(len(text))] = rng.randrange(256)  # type: ignore[index]
        elif rng.random() < 0.05:
            text = rng.choice([b"[" * 50_000, b" " * 70_000, b"", gzip.compress(text), text * 2, text[:-5]])
        return bytes(text)

    def request(self) -> tuple[str, str, bytes, list[tuple[str, str]]]:
        rng = self.rng
        method = rng.choice(METHODS)
        path = f"/gradio_api/{rng.choice(ROUTES)}" if rng.random() < 0.7 else rng.choice(PATHS)
        if rng.random() < 0.5:
            method, path = "POST", f"/gradio_api/{rng.choice(ROUTES[:2])}"
        if rng.random() < 0.15:
            path += "".join(rng.choice([*BITS, self.elsewhere]) for _ in range(rng.randrange(1, 5)))
        body = self.body() if method == "POST" or rng.random() < 0.1 else b""
        headers = [("Content-Type", "application/json")]
        odd = [
            ("Content-Type", rng.choice(["text/plain", "multipart/form-data; boundary=x", "application/json;x", ""])),
            ("Content-Encoding", rng.choice(["gzip", "identity", "br"])), ("Origin", rng.choice(["null", "http://a"])),
            ("Host", rng.choice(["localhost", "evil.example", "[", ""])), ("X-Forwarded-Host", self.elsewhere),
            ("X-Forwarded-For", "1.2.3.4"), ("X-Gradio-Server", self.elsewhere), ("Range", "bytes=0-1,2-3,-5"),
            ("Cookie", "a=" + "b" * 3000), ("Authorization", "Bearer x"), ("Transfer-Encoding", "chunked"),
            ("Content-Length", rng.choice(["-1", "0", "99999999999", "x", "5"])), ("Upgrade", "websocket"),
            ("Accept-Encoding", "br"), ("If-None-Match", "*"), ("X-Gradio-User", "api"),
        ]  # fmt: skip
        if rng.random() < 0.3:
            headers += rng.sample(odd, rng.randrange(1, 4))
        return method, path, body, headers

    def sent(self, address: str) -> str:
        """Send one request; the status line of the answer, "" where the server hung up."""
        parts = urlsplit(address)
        method, path, body, headers = self.request()
        names = {name for name, _ in headers}
        if "Host" not in names:
            headers.append(("Host", parts.netloc))
        if body and not names & {"Content-Length", "Transfer-Encoding"}:
            headers.append(("Content-Length", str(len(body))))
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers), "", ""]
        with socket.create_connection((str(parts.hostname), int(parts.port or 0)), timeout=0.5) as connection:
            try:
                connection.sendall("\r\n".join(lines).encode("utf-8", "surrogatepass") + body)
                return connection.recv(4096).split(b"\r\n")[0].decode("latin-1")
            except (TimeoutError, ConnectionError):
                return ""


def memory() -> float:
    """Of this process, MB."""
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def test_random_requests(text_folder: Path, text_pipe: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with canary() as (elsewhere, asked), serving(text_folder) as address:
        fuzzer = Fuzzer(SEED, Visitor(address, "model"), elsewhere)
        answers: Counter[str] = Counter()
        ends, before = time.monotonic() + SECONDS, 0.0
        for number in range(COUNT):
            if number == COUNT // 5:
                before = memory()  # after what is made once
            status = fuzzer.sent(address)
            answers[status[9:12]] += 1
            assert not re.match(r"HTTP/1\.1 5", status), (number, status)
            if time.monotonic() > ends:
                break
        assert asked == []
        assert {"200", "400", "404", "405", "413", "415", "421", "403"} <= set(answers), answers
        assert answers["200"] > sum(answers.values()) / 20, answers
        assert not before or memory() - before < GROWTH
        me = Visitor(address, "afterwards", source="127.0.0.8")
        me.press("generate", Prompt="red heart", Seed=1)
        status, images, *_ = me.results()
        assert "Done: " in status and image_in(images) == text_pipe("red heart", seed=1).images[0].tobytes()
    said = capfd.readouterr()
    assert "Traceback" not in said.err, said.err[:3000]


def test_many_slow_connections_leave_the_server_at_work(text_folder: Path) -> None:
    with serving(text_folder) as address:
        parts = urlsplit(address)
        place = (str(parts.hostname), int(parts.port or 0))
        slow = [socket.create_connection(place, timeout=LONG) for _ in range(300)]
        try:
            for connection in slow:
                connection.sendall(b"POST /gradio_api/run/predict HTTP/1.1\r\nHost: ")
            connection = http.client.HTTPConnection(*place, timeout=LONG)
            connection.request("GET", "/config")
            assert connection.getresponse().status == 200
            connection.close()
        finally:
            for one in slow:
                one.close()
