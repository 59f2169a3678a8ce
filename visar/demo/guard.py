"""What reaches Gradio: the requests that the page makes, and nothing else. ASGI middleware.

Gradio serves much that this page does not need: uploads, files by their path, a proxy, a second form of every call, and
boxes whose value is an address that it downloads. A list of what is allowed does not age as it grows. Bodies are read
and written anew, so Gradio sees what was checked and not what another parser makes of the same bytes.
"""

from __future__ import annotations

import json
import re
from typing import Annotated

from gradio import Blocks
from pydantic import BaseModel, ConfigDict, StringConstraints
from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from visar.demo.visitors import SESSION, Visitors, address_of
from visar.errors import VisarError
from visar.reading import once
from visar.serving.access import LARGEST, PATIENCE, Access, Refused, read_body, replayed

API = "/gradio_api"
DIRECT, QUEUED, EVENTS = f"{API}/run/predict", f"{API}/queue/join", f"{API}/queue/data"
NAME = r"[\w@~+-][\w@~+.-]*"  # of a folder or file; it does not begin with a dot
READ = re.compile(
    rf"/|/config|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/(assets|static)(/{NAME})+"
    rf"|{API}/(info|startup-events|heartbeat/{SESSION})|{EVENTS}",
    re.ASCII,
)

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
    event_data: dict[str, str | int | None] | None = None  # of a tab that is chosen; dropped


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
        body = await read_body(headers, scope, receive, LARGEST, PATIENCE)
        if scope["method"] == "POST":
            body = self._checked(body, headers, scope)
        elif body:
            raise Refused(400, "A request that only reads has no body.")
        return _scope(scope, session, len(body)), replayed(body, receive)

    def _checked(self, body: bytes, headers: Headers, scope: Scope) -> bytes:
        """The body of a press, written anew."""
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "A request is sent as application/json.")
        try:
            press = Body.model_validate(json.loads(body.decode(), object_pairs_hook=once))
            anew = press.model_dump_json(include={"data", "fn_index", "session_hash"}).encode()
        except (ValueError, RecursionError):
            raise Refused(400, BODY) from None
        event = self.page.fns.get(press.fn_index)
        queued = scope["path"] == QUEUED
        if event is None or event.fn is None or bool(event.queue) is not queued:
            raise Refused(400, f"There is no button {press.fn_index} here.")
        if len(press.data) != len(event.inputs):
            raise Refused(400, f"This button takes {len(event.inputs)} values, not {len(press.data)}.")
        if queued:
            try:
                self.visitors.may_ask(press.session_hash, address_of(scope))
            except VisarError as error:
                raise Refused(429, str(error)) from None
        return anew


def _scope(scope: Scope, session: str, length: int) -> Scope:
    """The scope without what Gradio would trust: forwarded names, other parameters, cookies."""
    drop = re.compile(rb"x-.*|forwarded|cookie|authorization|content-.*|transfer-encoding|range", re.DOTALL)
    headers = [pair for pair in scope["headers"] if not drop.fullmatch(pair[0])]
    if length:
        headers += [(b"content-type", b"application/json"), (b"content-length", str(length).encode())]
    query = f"session_hash={session}".encode() if session else b""
    return {**scope, "headers": headers, "query_string": query}
