"""What the server keeps of its visitors: how many may ask at once, what they have not read, and when it goes.

Gradio keeps 0.3 MB for each name that a browser gives itself, and frames for a browser that reads none of them. Its
private fields are named in this file alone, and `tests/demo` runs with the oldest and the newest version allowed.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from gradio import Blocks
from starlette.types import Scope

from visar.demo.requests import Limits
from visar.errors import VisarError

SESSION = "[A-Za-z0-9_-]{1,64}"  # the name that a browser gives itself


def address_of(scope: Scope) -> str:
    """The network address of a visitor; for IPv6 that of the network, in which one machine has all addresses."""
    host = (scope.get("client") or ("",))[0]
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return str(host)
    if isinstance(found, ipaddress.IPv6Address):
        return str(found.ipv4_mapped or ipaddress.ip_network((found, 64), strict=False))
    return str(found)


class Visitors:
    """The visitors of a page, by the session that a browser names and by address."""

    def __init__(self, page: Blocks, limits: Limits):
        self.page, self.limits = page, limits

    @property
    def _queue(self) -> Any:
        return self.page._queue

    def may_ask(self, session: str, address: str) -> None:
        """Raises `VisarError` while a session has a request, or others of its address have all that it may have."""
        self.forget()
        busy = {e.session_hash: address_of(e.request.scope) for e in self._events()}
        if session in busy:
            raise VisarError("Your last request is still at work; stop it first, or wait for its images.")
        if sum(other == address for other in busy.values()) >= self.limits.per_address:
            many = "a request" if self.limits.per_address == 1 else f"{self.limits.per_address} requests"
            raise VisarError(f"Your address has {many} at work or waiting in another window; try again in a while.")

    def waits(self, session: str) -> bool:
        """Whether the server has, or will have, something for a session."""
        return session in self._queue.pending_messages_per_session

    def unread(self, session: str) -> int:
        """Messages that a session has not read."""
        found = self._queue.pending_messages_per_session.get(session)
        return found.qsize() if found is not None else 0

    def forget(self) -> None:
        """Drop what is kept of sessions that did nothing for long."""
        states, queue = self.page.state_holder, self._queue
        busy = {e.session_hash for e in self._events()}
        long_ago = datetime.now() - timedelta(seconds=self.limits.idle)
        for session, last in list(states.time_last_used.items()):
            if last < long_ago and session not in busy:
                states.session_data.pop(session, None)
                states.time_last_used.pop(session, None)
        for kept in (queue.pending_messages_per_session, queue.pending_event_ids_session):
            for session in [s for s in list(kept) if s not in busy and s not in states.session_data]:
                kept.pop(session, None)

    def _events(self) -> Iterator[Any]:
        """Requests at work and waiting."""
        for waiting in list(self._queue.event_queue_per_concurrency_id.values()):
            yield from list(waiting.queue)
        for working in list(self._queue.active_jobs):
            yield from working or ()
