"""Who may ask a server of this machine, and how much: the Host and Origin headers, and the body of a request."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Message, Receive, Scope

from visar.errors import VisarError

LARGEST = 64 * 1024  # bytes of a body
PATIENCE = 20.0  # seconds until a body is there
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_-][a-z0-9_.-]*)(:\d{1,5})?", re.ASCII)
ORIGIN = re.compile(r"https?://(\*\.)?[a-z0-9-]+(\.[a-z0-9-]+)*(:\d{1,5})?", re.ASCII)
LOCAL = {"localhost", "127.0.0.1", "::1"}


@dataclass
class Access:
    """Who may use a server.

    `bound`: the name or address that the server listens on. `hosts`: other names of it, at any port. `frames`: origins
    of sites that may show its page in a frame. `proxies`: addresses whose X-Forwarded-For and X-Forwarded-Proto hold;
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
        """Whether a request with this Origin header comes from a page of this server."""
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
    """A request that goes no further: the status, and a sentence."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


async def read_body(headers: Headers, scope: Scope, receive: Receive, largest: int, patience: float) -> bytes:
    """The whole body, of at most `largest` bytes, within `patience` seconds.

    Raises `Refused` for a large, packed or slow one; it reads no more than that needs.
    """
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Refused(415, "A request is sent unpacked.")
    try:
        length = int(headers.get("content-length", "0"))
    except ValueError:
        length = largest + 1
    large = Refused(413, f"A request has at most {largest // 1024} KiB.")
    if not 0 <= length <= largest:
        raise large
    found = bytearray()
    try:
        with anyio.fail_after(patience):
            async for part in Request(scope, receive).stream():
                found += part
                if len(found) > largest:
                    raise large
    except TimeoutError:
        raise Refused(408, f"The request was not complete after {patience:.0f} seconds.") from None
    return bytes(found)


def replayed(body: bytes, receive: Receive) -> Receive:
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
