"""The queue: a ticket for each request, one request for each visitor."""

from __future__ import annotations

import secrets
import threading
from collections import Counter
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from visar.demo.jobs import BEFORE, Decode, Frame, Job, Stopped
from visar.demo.requests import Limits, Request
from visar.errors import VisarError
from visar.generation.output import ImageOutput
from visar.generation.progress import StepCallback

TICKETS = 4096  # in memory, used ones included


@dataclass
class Ticket:
    """A request of a visitor, and its job while it is served."""

    visitor: str
    request: Request
    address: str = ""
    tab: str = ""
    job: Job | None = None
    revoked: bool = False
    served: bool = False

    @property
    def at_work(self) -> bool:
        """Whether it is being served; a stopped one is until its last pass ends."""
        return self.job is not None and not (self.revoked and self.job.over)


class Desk:
    """Requests by their tickets. Decodings take turns, because they share models and the machine."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self._tickets: dict[str, Ticket] = {}
        self._lock, self._machine = threading.Lock(), threading.Lock()

    def ask(self, visitor: str, request: Request, address: str = "", tab: str = "") -> str:
        """A ticket for a request of a tab; it replaces a waiting one of the same visitor.

        Raises `VisarError` while a request of the visitor is being served.
        """
        with self._lock:
            for ticket in self._of(visitor):
                if ticket.at_work:
                    raise VisarError("Your last request is still at work; stop it first, or wait for its images.")
                ticket.revoked = True  # not served when its turn comes
            name = secrets.token_hex(16)
            self._tickets[name] = Ticket(visitor, request, address, tab)
            while len(self._tickets) > TICKETS:
                idle = {n: t for n, t in self._tickets.items() if not t.at_work}
                crowd = Counter(t.address for t in idle.values())
                # Revoked ones go first, then those of the address that has most: nobody pushes out others.
                del self._tickets[min(idle, key=lambda n: (not idle[n].revoked, -crowd[idle[n].address]))]
            return name

    def newest(self, visitor: str, tab: str) -> str:
        """The last ticket of a visitor's tab; "" if it has none."""
        with self._lock:
            return next((n for n, t in reversed(self._tickets.items()) if (t.visitor, t.tab) == (visitor, tab)), "")

    def request(self, name: str) -> Request:
        """The request of a ticket. Raises `VisarError` for an unknown ticket."""
        with self._lock:
            return self._ticket(name).request

    def stop(self, visitor: str) -> str:
        """Stop a visitor's running or waiting request: returns "work", "waiting", or "" if there is none."""
        with self._lock:
            found = [t for t in self._of(visitor) if not t.revoked]
            for ticket in found:
                ticket.revoked = True
                if ticket.job is not None:
                    ticket.job.stop()
            return "" if not found else "work" if any(t.job is not None for t in found) else "waiting"

    def serve(self, name: str) -> Generator[tuple[int, Frame], None, None]:
        """The frames of a ticket's decodings, each with the number of its sampler; none if it was served before.

        A visitor who asks again while waiting has two turns, and the first serves the last request. Raises `Stopped`
        for a revoked ticket, and `VisarError` for an unknown one.
        """
        with self._lock:
            ticket = self._ticket(name)
            if ticket.served:
                return
            ticket.served = True
        try:
            for number, sampler in enumerate(ticket.request.samplers):
                with self._lock:
                    if ticket.revoked:
                        raise Stopped(f"Stopped before {sampler.name} began." if number else BEFORE)
                    ticket.job = Job(_decoding(ticket.request, sampler), self._machine, limit=self.limits.seconds)
                with closing(ticket.job.frames()) as frames:
                    for frame in frames:
                        yield number, frame
        finally:
            with self._lock:
                ticket.job, ticket.revoked = None, True

    def _ticket(self, name: str) -> Ticket:
        if name not in self._tickets:
            raise VisarError("This request is not known any more; ask again.")
        return self._tickets[name]

    def _of(self, visitor: str) -> list[Ticket]:
        return [t for t in self._tickets.values() if t.visitor == visitor]


def _decoding(request: Request, sampler: Any) -> Decode:
    """The function that makes the images of a request with one of its samplers."""

    def decode(callback: StepCallback) -> ImageOutput:
        return request.model.model.generate(request.condition, sampler=sampler, callback=callback, **request.settings)

    return decode
