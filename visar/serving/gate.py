"""What stands before the routes: Host and Origin headers, API keys, bodies of a bounded size. ASGI middleware."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from visar.reading import Twice, once
from visar.serving.access import LARGEST, PATIENCE, Access, Refused, read_body, replayed
from visar.serving.problems import Problem, problem_of

OPEN = ("/health", "/ready")  # without a key
HEADERS = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'"}


class Keys:
    """API keys; without any, everybody may ask."""

    def __init__(self, keys: Sequence[str] = ()):
        self._hashes = [_hash(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def fit(self, header: str) -> bool:
        """Whether an Authorization header has one of them; takes as long for a wrong one as for a right one."""
        kind, _, given = header.partition(" ")
        found = _hash(given.strip())
        same = [hmac.compare_digest(found, known) for known in self._hashes]
        return kind.lower() == "bearer" and any(same)


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Gate:
    """Middleware that answers what the routes need not see, and errors that they do not catch."""

    def __init__(self, app: ASGIApp, access: Access, keys: Keys):
        self.app, self.access, self.keys = app, access, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        begun = False

        async def answer(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            await self.app(scope, await self._passed(scope, receive), answer)
        except ClientDisconnect:
            pass
        except Refused as no:
            await _refusal(no).response(_headers(no))(scope, receive, answer)
        except Exception as error:
            if not begun:
                await problem_of(error).response()(scope, receive, answer)
            else:
                logging.getLogger("visar").error("An answer ended early", exc_info=error)

    async def _passed(self, scope: Scope, receive: Receive) -> Receive:
        """The request for the routes. Raises `Refused`."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self.access.host(host, (scope.get("server") or ("",))[0]):
            raise Refused(421, "This server has another name; --allowed-host NAME lets it be reached by this one.")
        if (origin := headers.get("origin")) is not None and not self.access.origin(origin, host):
            raise Refused(403, "This comes from a web page of another site.")
        if self.keys and scope["path"] not in OPEN and not self.keys.fit(headers.get("authorization", "")):
            raise Refused(401, "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'.")
        if scope["method"] != "POST":
            return receive
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "A request is sent as application/json.")
        body = await read_body(headers, scope, receive, LARGEST, PATIENCE)
        try:
            json.loads(body, object_pairs_hook=once)
        except Twice as error:  # of two seeds the last would win
            raise Refused(400, f"The body cannot be read: {error}.") from None
        except (ValueError, RecursionError):
            pass  # what is no JSON is told by the routes
        return replayed(body, receive)


def _refusal(no: Refused) -> Problem:
    codes = {
        400: "invalid_json",
        401: "invalid_api_key",
        408: "timeout",
        413: "too_large",
        415: "unsupported_media_type",
    }
    return Problem(no.status, str(no), code=codes.get(no.status, "forbidden"))


def _headers(no: Refused) -> dict[str, str]:
    """Of a refusal. Where the body was not read, the connection ends, or it would be taken for the next request."""
    return {"Connection": "close"} | ({"WWW-Authenticate": "Bearer"} if no.status == 401 else {})
