"""Requests that the routes do not see: the lines of the table of docs/serving.md, over real sockets."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.api import JSON, KEY, Answer, Api, bearer, serving
from visar.pipelines import TextToImagePipeline
from visar.serving import gate
from visar.serving.access import LARGEST
from visar.serving.app import ROUTE
from visar.serving.gate import Keys


@pytest.fixture(scope="module")
def locked(text_folder: Path) -> Iterator[Api]:
    """A server with keys."""
    pipe = TextToImagePipeline.from_pretrained(text_folder)
    with serving(("text", pipe, ("scd",)), keys=("another-key", KEY)) as api:
        yield api


def test_api_keys(locked: Api) -> None:
    body = json.dumps({"prompt": "cat"}).encode()
    for headers in (
        {}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}, bearer(""), bearer(KEY[:-1]), bearer(KEY + "x"),
        bearer("\xe9"),
    ):  # fmt: skip
        answer = locked.ask(ROUTE, body, {**JSON, **headers})
        assert answer.status == 401 and answer.error["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/models", "/metrics", "/nix"):
        assert locked.ask(path).status == 401
    assert locked.ask("/health").status == locked.ask("/ready").status == 200
    for key in (KEY, "another-key"):
        assert locked.ask(ROUTE, body, bearer(key)).status == 200


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them are, whatever the first comparison gives."""
    compared: list[bytes] = []

    def compare(given: bytes, known: bytes) -> bool:
        compared.append(known)
        return given == known

    monkeypatch.setattr(gate.hmac, "compare_digest", compare)
    keys = Keys(["one-of-them", "two-of-them", "three-of-them"])
    assert keys.fit("Bearer one-of-them") and not keys.fit("Bearer none") and len(compared) == 6


def refusal(api: Api, *lines: str, body: bytes = b"") -> Answer:
    """What a request that is sent as it is gets; the server closes the connection."""
    with api.raw(*lines, body=body) as connection:
        found = b""
        while part := connection.recv(65536):
            found += part
    head, _, text = found.partition(b"\r\n\r\n")
    return Answer(int(head.split()[1]), {}, text)


@pytest.fixture(scope="module")
def api(text_folder: Path) -> Iterator[Api]:
    with serving(("text", TextToImagePipeline.from_pretrained(text_folder), ("scd", "ar"))) as served:
        yield served


def test_oversized_bodies(api: Api) -> None:
    """No more of them is read than is needed to know."""
    assert refusal(api, f"Content-Length: {10**12}").status == 413
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    answer = refusal(api, "Transfer-Encoding: chunked", body=chunk * (LARGEST // 4096 + 1))
    assert answer.status == 413 and answer.error["message"] == "A request has at most 64 KiB."
    most = json.dumps({"prompt": "cat"}).encode().ljust(LARGEST)
    assert api.ask(ROUTE, most, JSON).status == 200


def test_a_body_that_does_not_come(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "PATIENCE", 0.1)
    assert refusal(api, "Content-Length: 100", body=b'{"prompt"').status == 408


def test_other_content(api: Api) -> None:
    text = json.dumps({"prompt": "cat"}).encode()
    for headers in ({"Content-Type": "text/plain"}, {"Content-Type": "multipart/form-data"}, {}):
        assert api.ask(ROUTE, text, headers).error["code"] == "unsupported_media_type"
    packed = api.ask(ROUTE, gzip.compress(text), {**JSON, "Content-Encoding": "gzip"})
    assert packed.status == 415


def test_other_sites(api: Api) -> None:
    """A page of another site, and one whose name was pointed here (DNS rebinding)."""
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
        assert api.ask("/v1/models", headers={"Host": host}).status == 421
    for origin in ("https://evil.example", "null"):
        assert api.ask("/v1/models", headers={"Origin": origin}).status == 403
    assert api.ask("/v1/models", headers={"Host": "localhost:1", "Origin": "http://localhost:1"}).status == 200
