"""What reaches the demo over HTTP, and what does not: files and addresses, large and strange bodies, other sites."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import visar
from tests.helpers.stepped import LONG
from tests.helpers.web import JSON, Visitor, canary, get
from visar.demo import guard
from visar.demo.guard import LARGEST, READ, Access

REPOSITORY = Path(visar.__file__).parent.parent
NO_FILE = re.compile(rb'\{"detail":"(A request is a JSON object|There is nothing here|Allowed are|A request is sent)')


def sent(address: str, data: bytes) -> bytes:
    """The first bytes of the answer to raw bytes."""
    parts = urlsplit(address)
    with socket.create_connection((str(parts.hostname), int(parts.port or 0)), timeout=LONG) as connection:
        connection.sendall(data)
        found = b""
        while b"}" not in found and (more := connection.recv(65536)):
            found += more
        return found


def raw(address: str, body: bytes, *headers: str, path: str = "run/predict") -> bytes:
    lines = [f"POST /gradio_api/{path} HTTP/1.1", f"Host: {urlsplit(address).netloc}", *headers, "", ""]
    return sent(address, "\r\n".join(lines).encode() + body)


# Files and addresses


@pytest.mark.parametrize("wrapped", ["box", "list", "deep", "event_data", "key", "twice", "escaped", "url", "form"])
def test_no_address_is_asked(visitor: Visitor, served: str, wrapped: str, tmp_path: Path) -> None:
    with canary() as (address, asked):
        file: Any = {"path": f"{address}/big", "meta": {"_type": "gradio.FileData"}}
        if wrapped == "url":
            file = {"path": str(tmp_path), "url": f"{address}/big", "meta": {"_type": "gradio.FileData"}}
        event = visitor.button("generate")
        data = visitor.values(event)
        data[1] = {"list": [file], "deep": {"a": [{"b": file}]}}.get(wrapped, file)
        body: dict[str, Any] = {"data": data, "fn_index": event["id"], "session_hash": "thief"}
        if wrapped in ("event_data", "key"):
            body |= {"data": visitor.values(event), ("event_data" if wrapped == "event_data" else "files"): file}
        text = json.dumps(body)
        if wrapped == "twice":  # of two equal keys a parser takes one or the other
            plain = json.dumps({"data": visitor.values(event), "fn_index": event["id"], "session_hash": "thief"})
            text = f"{text[:-1]}, {plain[1:]}"
        if wrapped == "escaped":
            text = text.replace("path", "\\u0070ath").replace("_type", "\\u005ftype")
        headers = {"Content-Type": "application/x-www-form-urlencoded"} if wrapped == "form" else JSON
        for route in (
            "run/predict", "api/predict", "run/generate", "queue/join", "call/predict", "call/v2/predict", "cancel",
            "component_server", "stream/0", "upload", "reset", "process_recording",
        ):  # fmt: skip
            status, said = get(f"{served}/gradio_api/{route}", body=text.encode(), headers=headers)
            assert 400 <= status < 500 and NO_FILE.match(said), (route, status, said)
        for route in ("proxy=", "file=", "file/", "stream/"):
            for method in ("GET", "HEAD"):
                assert get(f"{served}/gradio_api/{route}{address}/big", method=method)[0] == 404
        assert asked == []


def test_a_tab_may_say_that_it_is_chosen(served: str, visitor: Visitor) -> None:
    (event,) = (d for d in visitor.config["dependencies"] if any(kind == "select" for _, kind in d["targets"]))
    body = {"data": visitor.values(event), "fn_index": event["id"], "session_hash": "me"}
    body["event_data"] = {"value": "Samplers", "index": 2, "id": "tab", "component_id": 3}
    status, said = get(f"{served}/gradio_api/run/predict", body=json.dumps(body).encode(), headers=JSON)
    assert status == 200 and b"scd" in said


def test_what_only_the_page_does_cannot_be_asked(served: str, visitor: Visitor) -> None:
    (event,) = (d for d in visitor.config["dependencies"] if not d["backend_fn"])
    status, said = visitor.sends("run/predict", event, visitor.values(event))
    assert status == 400 and b"no button" in said


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd", "%2Fetc%2Fpasswd", "file:///etc/passwd", "/proc/self/environ", "http://127.0.0.1:1/",
        str(REPOSITORY / "pyproject.toml"), "pyproject.toml", "../pyproject.toml", str(Path(visar.__file__)),
        "..%2f..%2f..%2fetc%2fpasswd", "img/../../../../../../../etc/passwd", "%2e%2e/__init__.py", ".hidden",
        "..\\..\\etc\\passwd", "img/%00", "%c0%ae%c0%ae/passwd",
    ],
)  # fmt: skip
def test_no_file_is_handed_out(served: str, path: str) -> None:
    for route in (
        "gradio_api/file=", "file=", "gradio_api/static/", "static/", "assets/", "gradio_api/proxy=", "svelte/",
        "gradio_api/custom_component/0/client/", "gradio_api/file/", "theme",
    ):  # fmt: skip
        status, body = get(f"{served}/{route}{path}")
        assert status in (400, 403, 404), (route, status)
        assert b"root:" not in body and b"[build-system]" not in body and b"def " not in body


def test_nothing_is_uploaded(served: str) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nleft here\r\n--x--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    for route in ("upload", "upload?upload_id=1", "component_server", "process_recording", "run/predict"):
        assert get(f"{served}/gradio_api/{route}", body=body, headers=headers)[0] in (404, 415)


def test_routes_that_the_page_does_not_need_are_closed(served: str) -> None:
    """Of all routes of Gradio's application."""
    import gradio

    def routes(router: Any) -> Iterator[tuple[str, str]]:
        for route in router.routes:
            if hasattr(route, "path"):
                yield from ((method, route.path) for method in route.methods or ())
            inner = getattr(route, "original_router", None) or getattr(route, "app", None)
            if hasattr(inner, "routes") and not hasattr(route, "path"):
                yield from routes(inner)

    with gradio.Blocks() as page:
        gradio.Textbox()
    found = set(routes(gradio.routes.App.create_app(page)))
    filled = {(m, re.sub(r"\{[^}]*\}", "x", path).rstrip("/") or "/") for m, path in found}
    assert len(filled) > 40
    endless = "/gradio_api/heartbeat/x"  # open, and a stream that tells when a window is closed
    filled = {(m, path) for m, path in filled if m in ("GET", "HEAD", "POST") and path != endless}
    answers = {(m, path): get(served + path, method=m)[0] for m, path in filled}
    opened = {path for (method, path), status in answers.items() if status == 200 and method != "POST"}
    assert opened <= {
        "/", "/config", "/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json", "/gradio_api/info",
        "/gradio_api/startup-events",
    } and "/" in opened  # fmt: skip
    posts = {path for (method, path), status in answers.items() if method == "POST" and status != 404}
    assert posts == {"/gradio_api/queue/join"}  # and of /gradio_api/run/{name} the one for "predict"
    for method in ("PUT", "DELETE", "PATCH", "TRACE", "PROPFIND", "OPTIONS"):
        assert get(served, method=method)[0] == 405
    assert not READ.fullmatch("/gradio_api/mcp/sse") and not READ.fullmatch("/gradio_api/queue/data/")


def test_the_description_of_the_page_names_no_path(served: str) -> None:
    for path in ("", "/config", "/gradio_api/info", "/manifest.json", "/theme.css"):
        text = re.sub(r"base64,[\w+/=]+", "", get(served + path)[1].decode())  # a thumbnail may spell anything
        for private in (str(Path.home()), str(REPOSITORY), str(Path.cwd()), "site-packages", socket.gethostname()):
            assert private == "/" or private not in text, (path, private)


def test_what_a_query_or_a_header_asks_of_gradio_is_left_out(served: str) -> None:
    plain = get(f"{served}/config")[1]
    for query in ("deep_link=../../x", "page=x", "deep_link=" + "0" * 11):
        assert get(f"{served}/config?{query}")[1] == plain
    for name in ("X-Forwarded-Host", "X-Gradio-Server", "X-Forwarded-Proto", "Forwarded"):
        said = get(served, headers={name: "https://evil.example"})[1]
        assert b"evil.example" not in said and b"https://127" not in said


# Bodies


def test_large_bodies_are_refused(served: str, visitor: Visitor) -> None:
    event = visitor.button("stop")
    for fill in (LARGEST, 5_000_000):
        said = raw(served, b"", "Content-Type: application/json", f"Content-Length: {fill + 1}")
        assert b" 413 " in said.splitlines()[0] and b"at most 64 KiB" in said  # before any of it is sent
        chunk = b" " * 8192
        chunks = b"".join(b"2000\r\n" + chunk + b"\r\n" for _ in range(min(fill // 8192, 16))) + b"1\r\n \r\n0\r\n\r\n"
        said = raw(served, chunks, "Content-Type: application/json", "Transfer-Encoding: chunked")
        assert b" 413 " in said.splitlines()[0]
    body = {"data": [], "fn_index": event["id"], "session_hash": "x"}
    text = json.dumps(body).encode().ljust(LARGEST)
    assert get(f"{served}/gradio_api/run/predict", body=text, headers=JSON)[0] == 200
    assert get(f"{served}/gradio_api/run/predict", body=text + b" ", headers=JSON)[0] == 413
    for path in ("", "/config"):
        assert get(served + path, method="GET", body=b"{}")[0] == 400
    assert get(f"{served}/gradio_api/upload", body=text * 9)[0] == 404


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", BODY := b"A request is a JSON object"), (b"{", BODY), (b"[]", BODY), (b"null", BODY), (b'"x"', BODY),
        (b"[" * 60_000, BODY), (b'{"data":' + b"[" * 3000 + b"]" * 3000 + b"}", BODY), (b"{}", BODY),
        (b'{"data": [], "fn_index": 0}', BODY), (b'{"data": [], "session_hash": "x"}', BODY),
        (b'{"data": {}, "fn_index": 0, "session_hash": "x"}', BODY),
        (b'{"data": [], "fn_index": "0", "session_hash": "x"}', BODY),
        (b'{"data": [], "fn_index": 0.5, "session_hash": "x"}', BODY),
        (b'{"data": [], "fn_index": true, "session_hash": "x"}', BODY),
        (b'{"data": [], "fn_index": 0, "session_hash": "../x"}', BODY),
        (b'{"data": [], "fn_index": 0, "session_hash": ""}', BODY),
        (b'{"data": [], "fn_index": 0, "session_hash": "' + b"x" * 65 + b'"}', BODY),
        (b'{"data": [], "fn_index": 0, "session_hash": "x\\n"}', BODY),
        (b'{"data": ["\xff"], "fn_index": 0, "session_hash": "x"}', BODY),
        (b'{"data": ["\\ud800"], "fn_index": 0, "session_hash": "x"}', BODY),
        (b'{"data": [NaN], "fn_index": 0, "session_hash": "x"}', BODY),
        (b'{"data": [1e999], "fn_index": 0, "session_hash": "x"}', BODY),
        (b'{"data": [' + b"9" * 9000 + b'], "fn_index": 0, "session_hash": "x"}', BODY),
        ("{}".encode("utf-16"), BODY),
        (b'{"data": [], "fn_index": 999, "session_hash": "x"}', b"There is no button 999 here."),
        (b'{"data": [], "fn_index": -1, "session_hash": "x"}', b"There is no button -1 here."),
    ],
)  # fmt: skip
def test_strange_bodies_are_a_sentence(served: str, text: bytes, why: bytes) -> None:
    status, said = get(f"{served}/gradio_api/run/predict", body=text, headers=JSON)
    assert status == 400 and said.startswith(b'{"detail":"'), (status, said)
    status, again = get(f"{served}/gradio_api/queue/join", body=text, headers=JSON)
    assert status == 400 and why in again and why in said, (status, said, again)


@pytest.mark.parametrize("place", ["run/predict", "queue/join"])
def test_another_number_of_values_is_refused(served: str, place: str) -> None:
    """Of every button of the page; only one of the two addresses knows it."""
    said = []
    for index in range(40):
        text = json.dumps({"data": [1] * 90, "fn_index": index, "session_hash": "x"}).encode()
        status, answer = get(f"{served}/gradio_api/{place}", body=text, headers=JSON)
        said.append(answer)
        assert status == 400, (index, answer)
    assert any(b"values, not 90." in answer for answer in said)
    assert {answer.split(b" ")[0] for answer in said} <= {b'{"detail":"This', b'{"detail":"There'}


def test_other_forms_of_a_body_are_refused(served: str, visitor: Visitor) -> None:
    event = visitor.button("stop")
    text = json.dumps({"data": [], "fn_index": event["id"], "session_hash": "x"}).encode()
    url = f"{served}/gradio_api/run/predict"
    assert get(url, body=text, headers={"Content-Type": "Application/JSON; charset=utf-8"})[0] == 200
    for kind in ("text/plain", "text/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert get(url, body=text, headers={"Content-Type": kind})[0] == 415
    for coding in ("gzip", "br", "deflate", "gzip, gzip"):
        headers = {**JSON, "Content-Encoding": coding}
        assert get(url, body=gzip.compress(text), headers=headers)[0] == 415
    bomb = gzip.compress(b" " * 5_000_000)
    assert get(url, body=bomb, headers={**JSON, "Content-Encoding": "gzip"})[0] in (413, 415)


def test_a_body_that_does_not_come_is_not_waited_for(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "PATIENCE", 0.1)
    for path in ("run/predict", "queue/join"):
        said = raw(served, b'{"data"', "Content-Type: application/json", "Content-Length: 100", path=path)
        assert b" 408 " in said.splitlines()[0], said


def test_a_websocket_is_refused() -> None:
    said: list[Any] = []

    async def send(message: Any) -> None:
        said.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    middle = guard.Guard(None, None, Access(), None)  # type: ignore[arg-type]  # nothing else is asked
    asyncio.run(middle({"type": "websocket", "path": "/gradio_api/queue/join", "headers": []}, receive, send))
    assert said == [{"type": "websocket.close", "code": 1008}]


def junk() -> list[Any]:
    return [
        None, True, False, "", "x", "x" * 3000, "../../etc/passwd", "a.py:B", "http://127.0.0.1:1/x", -1, 0, 0.5, 1e300,
        -1e300, 10**18, 10**300, "\x00", "é\u202e", "1", "nan",
    ]  # fmt: skip


def test_any_value_in_any_box_gets_an_answer(served: str) -> None:
    """Never an HTTP 500: a sentence where the value cannot be, however the box is filled."""
    visitor = Visitor(served, "strange")
    events = [d for d in visitor.config["dependencies"] if not d["queue"] and d["inputs"]]
    assert len(events) >= 6
    refused = 0
    for event in events:
        plain = visitor.values(event)
        for box in range(len(plain)):
            for value in junk()[box % 7 :: 7] if len(plain) > 3 else junk()[::3]:
                data = [*plain[:box], value, *plain[box + 1 :]]
                status, said = visitor.sends("run/predict", event, data)
                assert status == 200, (event["id"], box, value, said)
                refused += b'role=\\"alert\\"' in said
    assert refused > 30
    for box, value, why in (("Sampler", "a.py:B", "a.py:B"), ("Images", 99, "from 1 to 4"), ("Prompt", None, "empty")):
        assert why in visitor.answer("generate", **{box: value})


@pytest.mark.parametrize("button", ["generate", "compare"])
def test_any_value_of_a_request_gets_an_answer(served: str, button: str) -> None:
    """The same for requests that wait: all boxes at once hold what they cannot."""
    visitor = Visitor(served, f"strange-{button}")
    event = visitor.button(button)
    for value in junk():
        plain = visitor.values(event)
        value = value[:500] if isinstance(value, str) else value  # a body has 64 KiB
        for data in ([value] * len(plain), [*plain[:2], *[value] * (len(plain) - 2)]):
            status, said = visitor.sends("queue/join", event, data)
            assert status == 200, (value, said)
            assert 'role="alert"' in visitor.results()[0], value
