"""What the server keeps of its visitors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.stepped import LONG
from tests.helpers.web import Visitor, serving
from visar.demo import requests, server
from visar.demo.requests import Limits
from visar.demo.visitors import Visitors, address_of


@pytest.fixture(scope="module")
def launched() -> list[Any]:
    return []


@pytest.fixture(scope="module")
def served(text_folder: Path, launched: list[Any]) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        original = server.launch

        def launch(page: Any, access: Any, limits: Limits, *rest: Any) -> Any:
            launched.append(Visitors(page, limits))
            return original(page, access, limits, *rest)

        patch.setattr(server, "launch", launch)
        patch.setattr(requests, "Limits", partial(Limits, sessions=8, unread=5))
        with serving(text_folder, "--max-per-address", "3") as address:
            yield address


def test_sessions_do_not_pile_up(served: str, launched: list[Any]) -> None:
    states, queue = launched[0].page.state_holder, launched[0].page._queue
    for number in range(20):
        visitor = Visitor(served, f"many{number}")
        visitor.press("generate", Prompt="")
        visitor.wait()
        assert len(visitor.results()) == 1
    assert len(states.session_data) <= 8 and len(queue.pending_messages_per_session) <= 8
    launched[0].forget()
    assert len(queue.pending_event_ids_session) <= 8


def test_who_does_nothing_for_long_is_forgotten(served: str, launched: list[Any]) -> None:
    states = launched[0].page.state_holder
    old, new = Visitor(served, "old"), Visitor(served, "new")
    old.press("generate", Prompt="")
    new.press("generate", Prompt="")
    states.time_last_used["old"] = datetime.now() - timedelta(seconds=3601)
    launched[0].forget()
    assert "old" not in states.session_data and "old" not in states.time_last_used and "new" in states.session_data
    old.press("generate", Prompt="red heart")
    old.wait()
    assert "done, " in old.results()[0][0]  # and is served as before


def test_the_request_of_a_forgotten_session_is_served(
    served: str, launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = threading.Event()
    monkeypatch.setattr("visar.demo.jobs.warm_up", lambda *_: hold.wait(LONG))
    first, me = Visitor(served, "first"), Visitor(served, "me")
    for visitor in (first, me):
        visitor.press("generate")
        visitor.wait()
    for number in range(10):  # push it out of what Gradio keeps
        Visitor(served, f"flood{number}").press("stop")
    assert "me" not in launched[0].page.state_holder.session_data
    hold.set()
    assert "done, " in me.results()[0][0]


def test_who_reads_nothing_is_not_decoded_for(
    served: str, launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from visar.demo.jobs import Job

    monkeypatch.setattr(Job, "__init__", _every_pass(Job.__init__))
    visitor = Visitor(served, "deaf")
    visitor.press("generate", Sampler="ar")
    visitor.wait()
    while launched[0].unread("deaf") < 5 or list(launched[0]._events()):
        time.sleep(0.01)  # it listens to nothing meanwhile
    assert launched[0].unread("deaf") < 12
    assert "nobody was looking" in visitor.results()[0][0]


def _every_pass(original: Any) -> Any:
    def init(self: Any, decode: Any, machine: Any, every: float = 0, limit: float = 600) -> None:
        original(self, decode, machine, 0, limit)

    return init


@pytest.mark.parametrize(
    ("client", "address"),
    [
        (("192.0.2.1", 5), "192.0.2.1"), (("2001:db8:1:2:3:4:5:6", 1), "2001:db8:1:2::/64"), (None, ""),
        (("::ffff:192.0.2.1", 1), "192.0.2.1"), (("fe80::1%eth0", 1), "fe80::/64"), (("socket", 0), "socket"),
    ],
)  # fmt: skip
def test_the_address_of_a_visitor(client: Any, address: str) -> None:
    assert address_of({"client": client}) == address
