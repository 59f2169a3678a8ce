"""What reaches Gradio: the requests that the page makes, and nothing else. ASGI middleware.

Gradio serves much that this page does not need: uploads, files by their path, a proxy, a second form of every call, and
boxes whose value is an address that it downloads. A list of what is allowed does not age as it grows. Bodies are read
and written anew, so Gradio sees what was checked and not what another parser makes of the same bytes.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urlsplit

import anyio
from gradio import Blocks
from pydantic import BaseModel, ConfigDict, StringConstraints
from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from visar.demo.visitors import SESSION, Visitors, address_of
from visar.errors import VisarError

LARGEST = 64 * 1024  # bytes of a body
PATIENCE = 20.0  # seconds until a body is there

API = "/gradio_api"
DIRECT, QUEUED, EVENTS = f"{API}/run/predict", f"{API}/queue/join", f"{API}/queue/data"
NAME = r"[\w@~+-][\w@~+.-]*"  # of a folder or file; it does not begin with a dot
READ = re.compile(
    rf"/|/config|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/(assets|static)(/{NAME})+"
    rf"|{API}/(info|startup-events|heartbeat/{SESSION})|{EVENTS}",
    re.ASCII,
)
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_-][a-z0-9_.-]*)(:\d{1,5})?", re.ASCII)
ORIGIN = re.compile(r"https?://(\*\.)?[a-z0-9-]+(\.[a-z0-9-]+)*(:\d{1,5})?", re.ASCII)
LOCAL = {"localhost", "127.0.0.1", "::1"}

BODY = (
    'A request is a JSON object of "data", "fn_index" and "session_hash". The data are the values of the boxes: texts, '
    "numbers, true, false and null. No file, address or list is taken."
)


class Body(BaseModel):
    """A press of a button, as the page sends it."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    data: list[str | int | float | bool | None]
    fn_index: int
    session_hash: Annotated[str, StringConstraints(pattern=f"^{SESSION}$")]
    trigger_id: int | None = None
    event_data: None = None


@dataclass
class Access:
    """Who may use the page.

    `bound`: the name or address that the server listens on. `hosts`: other names of it, at any port. `frames`: origins
    of sites that may show the page in a frame. `proxies`: addresses whose X-Forwarded-For and X-Forwarded-Proto hold;
    "*" for all.

    Raises `VisarError` for what is no host name, origin or address.
    """

    bound: str = ""
    hosts: Collection[str] = ()
    frames: Sequence[str] = ()
    proxies: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in self.hosts:
            if (bare := HOST.fullmatch(name.lower())) is None or bare[2]:
                raise VisarError(f"{name!r} is no name of a host; --allowed-host takes one such as demo.example.org.")
        for origin in self.frames:
            if not ORIGIN.fullmatch(origin):
                raise VisarError(f"{origin!r} is no origin; --embed-in takes one such as https://huggingface.co.")
        for address in self.proxies:
            if address != "*" and not _is_network(address):
                raise VisarError(f"{address!r} is no address; --trusted-proxy takes one as 10.0.0.2 or 10.0.0.0/8.")
        self.hosts = {name.lower().strip("[]") for name in self.hosts}

    def host(self, given: str, reached: str) -> bool:
        """Whether a Host header names this server, reached at the address `reached`.

        A page of another site whose name was pointed here (DNS rebinding) sends its own name.
        """
        found = HOST.fullmatch(given.lower())
        if found is None:
            return False
        name = found[1].strip("[]")
        return name in {*LOCAL, self.bound.lower()} or name in self.hosts or _same_address(name, reached)

    def origin(self, given: str, host: str) -> bool:
        """Whether a request with this Origin header comes from the page itself."""
        try:
            parts = urlsplit(given.lower())
            return bool(parts.netloc) and (parts.netloc == host.lower() or parts.hostname in self.hosts)
        except ValueError:
            return False

    @property
    def headers(self) -> dict[str, str]:
        """The headers of every answer."""
        frames = " ".join(self.frames) or "'none'"
        found = {
            "Content-Security-Policy": f"frame-ancestors {frames}; object-src 'none'; base-uri 'self'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "same-origin",
        }
        return found if self.frames else {**found, "X-Frame-Options": "DENY"}


class Refused(Exception):
    """A request that Gradio does not see: the status, and a sentence."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


class Guard:
    """Middleware that lets the requests of `page` pass."""

    def __init__(self, app: ASGIApp, page: Blocks, access: Access, visitors: Visitors):
        self.app, self.page, self.access, self.visitors = app, page, access, visitors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # the page opens no WebSocket
            return await send({"type": "websocket.close", "code": 1008})

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.access.headers)
            await send(message)

        try:
            passed = await self._passed(scope, receive)
        except Refused as no:
            await JSONResponse({"detail": str(no)}, no.status)(scope, receive, answer)
        except ClientDisconnect:
            pass
        else:
            await self.app(*passed, answer)

    async def _passed(self, scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
        """The request for Gradio. Raises `Refused`."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self.access.host(host, (scope.get("server") or ("",))[0]):
            raise Refused(421, "This server has another name; --allowed-host NAME lets it be reached by this one.")
        if (origin := headers.get("origin")) is not None and not self.access.origin(origin, host):
            raise Refused(403, "Only the page itself may ask; this comes from a page of another site.")
        if scope["method"] not in ("GET", "HEAD", "POST"):
            raise Refused(405, "Allowed are GET, HEAD and POST.")
        path = scope["path"]
        if path not in (DIRECT, QUEUED) if scope["method"] == "POST" else not READ.fullmatch(path):
            raise Refused(404, "There is nothing here.")
        session = ""
        if path == EVENTS:
            session = QueryParams(scope["query_string"]).get("session_hash", "")
            if not self.visitors.waits(session):
                raise Refused(404, "This visitor waits for nothing.")
        body = await _body(headers, scope, receive)
        if scope["method"] == "POST":
            body = self._checked(body, headers, scope)
        elif body:
            raise Refused(400, "A request that only reads has no body.")
        return _scope(scope, session, len(body)), _replayed(body, receive)

    def _checked(self, body: bytes, headers: Headers, scope: Scope) -> bytes:
        """The body of a press, written anew."""
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "A request is sent as application/json.")
        try:
            press = Body.model_validate(json.loads(body.decode(), object_pairs_hook=_once))
            anew = press.model_dump_json(include={"data", "fn_index", "session_hash"}).encode()
        except (ValueError, RecursionError):
            raise Refused(400, BODY) from None
        event = self.page.fns.get(press.fn_index)
        queued = scope["path"] == QUEUED
        if event is None or bool(event.queue) is not queued:
            raise Refused(400, f"There is no button {press.fn_index} here.")
        if len(press.data) != len(event.inputs):
            raise Refused(400, f"This button takes {len(event.inputs)} values, not {len(press.data)}.")
        if queued:
            try:
                self.visitors.may_ask(press.session_hash, address_of(scope))
            except VisarError as error:
                raise Refused(429, str(error)) from None
        return anew


async def _body(headers: Headers, scope: Scope, receive: Receive) -> bytes:
    """The whole body. Raises `Refused` for a large, packed or slow one; it reads no more than that needs."""
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Refused(415, "A request is sent unpacked.")
    try:
        length = int(headers.get("content-length", "0"))
    except ValueError:
        length = LARGEST + 1
    large = Refused(413, f"A request has at most {LARGEST // 1024} KiB.")
    if not 0 <= length <= LARGEST:
        raise large
    found = bytearray()
    try:
        with anyio.fail_after(PATIENCE):
            async for part in Request(scope, receive).stream():
                found += part
                if len(found) > LARGEST:
                    raise large
    except TimeoutError:
        raise Refused(408, f"The request was not complete after {PATIENCE:.0f} seconds.") from None
    return bytes(found)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys all differ: of two equal ones, parsers take one or the other."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError
    return found


def _scope(scope: Scope, session: str, length: int) -> Scope:
    """The scope without what Gradio would trust: forwarded names, other parameters, cookies."""
    drop = re.compile(rb"x-.*|forwarded|cookie|authorization|content-.*|transfer-encoding|range", re.DOTALL)
    headers = [pair for pair in scope["headers"] if not drop.fullmatch(pair[0])]
    if length:
        headers += [(b"content-type", b"application/json"), (b"content-length", str(length).encode())]
    query = f"session_hash={session}".encode() if session else b""
    return {**scope, "headers": headers, "query_string": query}


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body, and then what comes after it: the end of the connection."""
    parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return parts.pop() if parts else await receive()

    return again


def _same_address(name: str, reached: str) -> bool:
    try:
        return ipaddress.ip_address(name) == ipaddress.ip_address(reached.partition("%")[0])
    except ValueError:
        return name == reached.lower()


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    return True
