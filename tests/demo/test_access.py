"""Who may use the demo: the names of its host, pages of other sites, and how many requests an address has."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from tests.helpers.stepped import held
from tests.helpers.web import JSON, Visitor, ask, get
from visar.cli import main
from visar.demo.guard import Access


@pytest.mark.parametrize(
    ("host", "let"),
    [
        ("127.0.0.1:{port}", True), ("localhost:{port}", True), ("LOCALHOST", True), ("[::1]:{port}", True),
        ("demo.example.org", True), ("demo.EXAMPLE.org:443", True), ("evil.example", False), ("", False),
        ("127.0.0.1.evil.example", False), ("evil@localhost", False), ("localhost/evil", False), ("10.0.0.1", False),
        ("localhost:x", False), ("a.demo.example.org", False), ("2130706433", False), ("[evil]", False),
    ],
)  # fmt: skip
def test_the_host_is_checked(served: str, visitor: Visitor, host: str, let: bool) -> None:
    host = host.format(port=urlsplit(served).port)
    event = visitor.button("stop")
    body = json.dumps({"data": [], "fn_index": event["id"], "session_hash": "x"}).encode()
    for status, said in (
        get(served, headers={"Host": host}), get(f"{served}/theme.css", headers={"Host": host}),
        get(f"{served}/gradio_api/run/predict", body=body, headers={**JSON, "Host": host}),
    ):  # fmt: skip
        assert status == (200 if let else 421), said
        assert let or b"--allowed-host" in said


@pytest.mark.parametrize(
    ("origin", "let"),
    [
        ("http://{netloc}", True), ("https://demo.example.org", True), ("http://evil.example", False), ("null", False),
        ("http://127.0.0.1:1", False), ("http://{netloc}.evil.example", False), ("", False), ("http://[", False),
        ("file://", False),
    ],
)  # fmt: skip
def test_the_origin_is_checked(served: str, visitor: Visitor, origin: str, let: bool) -> None:
    event = visitor.button("stop")
    body = json.dumps({"data": [], "fn_index": event["id"], "session_hash": "x"}).encode()
    headers = {"Origin": origin.format(netloc=urlsplit(served).netloc)}
    status, _ = get(f"{served}/gradio_api/run/predict", body=body, headers={**JSON, **headers})
    assert status == (200 if let else 403)
    assert get(f"{served}/config", headers=headers)[0] == (200 if let else 403)


def test_every_answer_has_the_headers(served: str) -> None:
    for url, options in (
        (served, {}), (f"{served}/config", {}), (f"{served}/nothing", {}), (f"{served}/assets/nothing.js", {}),
        (f"{served}/gradio_api/upload", {"body": b""}), (served, {"headers": {"Host": "evil.example"}}),
    ):  # fmt: skip
        headers = ask(url, **options)[2]  # type: ignore[arg-type]
        assert headers["x-frame-options"] == "DENY" and headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["referrer-policy"] == "same-origin"


def test_a_site_may_show_it_in_a_frame() -> None:
    found = Access(frames=["https://huggingface.co", "https://*.hf.space"]).headers
    assert "frame-ancestors https://huggingface.co https://*.hf.space;" in found["Content-Security-Policy"]
    assert "X-Frame-Options" not in found


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("--embed-in", "huggingface.co", "is no origin"), ("--embed-in", "https://a.b/c", "is no origin"),
        ("--embed-in", "https://a.b; script-src *", "is no origin"), ("--embed-in", "*", "is no origin"),
        ("--allowed-host", "*", "is no name of a host"), ("--allowed-host", "https://a.b", "is no name of a host"),
        ("--allowed-host", "a.b:80", "is no name of a host"), ("--trusted-proxy", "nginx", "is no address"),
        ("--trusted-proxy", "", "--trusted-proxy is empty"), ("--max-per-address", "0", "must be 1 or more"),
    ],
)  # fmt: skip
def test_bad_options_are_a_sentence(option: str, value: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--port", "0", option, value]) == 2
    assert why in capsys.readouterr().err


# Visitors


@pytest.fixture
def at_work(served: str) -> Iterator[Visitor]:
    """A visitor whose request stays at work."""
    with held() as go:
        first = Visitor(served, f"held{time.monotonic_ns()}", source="127.0.0.2")
        first.press("generate")
        yield first
        go.set()
        assert "Done: " in first.results()[0]


def test_one_request_from_an_address(served: str, at_work: Visitor) -> None:
    event = at_work.button("generate")
    values = at_work.values(event)
    for name in ("other-window", "name1", "name2"):  # whatever it calls itself
        status, said = Visitor(served, name, source="127.0.0.2").sends("queue/join", event, values)
        assert status == 429 and b"Your address has a request at work" in said
    status, said = at_work.sends("queue/join", event, values)
    assert status == 429 and b"Your last request is still at work" in said
    for name in ("127.0.0.7", "127.0.0.2"):  # nor what it says of its address
        forged = {"data": values, "fn_index": event["id"], "session_hash": "forged"}
        headers = {**JSON, "X-Forwarded-For": "203.0.113.5", "Forwarded": "for=203.0.113.5", "X-Real-IP": name}
        url = f"{served}/gradio_api/queue/join"
        assert get(url, body=json.dumps(forged).encode(), headers=headers, source="127.0.0.2")[0] == 429
    neighbour = Visitor(served, "neighbour", source="127.0.0.3")
    assert neighbour.sends("queue/join", event, values)[0] == 200
    assert get(f"{at_work.api}/run/predict", body=b"{}", headers=JSON)[0] == 400


def test_a_proxy_that_is_trusted_says_who_asks(served: str, at_work: Visitor) -> None:
    event = at_work.button("generate")
    data = {"data": at_work.values(event), "fn_index": event["id"], "session_hash": f"far{time.monotonic_ns()}"}
    body = json.dumps(data).encode()
    url = f"{served}/gradio_api/queue/join"
    headers = {**JSON, "X-Forwarded-For": "203.0.113.5, 127.0.0.2"}  # the last one is what the proxy saw
    assert get(url, body=body, headers=headers, source="127.0.0.9")[0] == 429
    assert get(url, body=body, headers={**JSON, "X-Forwarded-For": "198.51.100.7"}, source="127.0.0.9")[0] == 200
    said = get(served, headers={"X-Forwarded-Proto": "https", "Host": "demo.example.org"}, source="127.0.0.9")[1]
    assert b"https://demo.example.org" in said


def test_who_waits_for_nothing_gets_no_stream(served: str) -> None:
    for session in ("", "nobody", "../x", "x" * 100):
        assert get(f"{served}/gradio_api/queue/data?session_hash={session}")[0] == 404
    assert get(f"{served}/gradio_api/queue/data")[0] == 404
