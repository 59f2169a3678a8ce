"""What the server keeps of its visitors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.stepped import held, until
from tests.helpers.web import Visitor, serving
from visar.demo import requests, server
from visar.demo.requests import Limits
from visar.demo.visitors import Visitors, address_of
from visar.generation.pool import Pool


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
        assert "empty" in Visitor(served, f"many{number}").answer("generate", Prompt="")
    assert len(states.session_data) <= 8 and len(queue.pending_messages_per_session) <= 8
    launched[0].forget()
    assert len(queue.pending_event_ids_session) <= 8


def test_who_does_nothing_for_long_is_forgotten(served: str, launched: list[Any]) -> None:
    states = launched[0].page.state_holder
    old, new = Visitor(served, "old"), Visitor(served, "new")
    old.press("stop")
    new.press("stop")
    states.time_last_used["old"] = datetime.now() - timedelta(seconds=3601)
    launched[0].forget()
    assert "old" not in states.session_data and "old" not in states.time_last_used and "new" in states.session_data
    assert "Done: " in old.answer("generate", Prompt="red heart")  # and is served as before


def test_the_request_of_a_forgotten_session_is_served(served: str, launched: list[Any]) -> None:
    with held() as go:
        me = Visitor(served, "me")
        me.press("generate")
        for number in range(10):  # push it out of what Gradio keeps
            Visitor(served, f"flood{number}").press("stop")
        assert "me" not in launched[0].page.state_holder.session_data
        go.set()
        assert "Done: " in me.results()[0]


def test_who_reads_nothing_is_not_decoded_for(
    served: str, launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visar.demo.runs.EVERY", 0)
    monkeypatch.setattr(Pool, "step", _slowly(Pool.step))
    visitor = Visitor(served, "deaf")
    visitor.press("generate", Sampler="ar")
    until(lambda: launched[0].unread("deaf") >= 5 and not list(launched[0]._events()))  # it listens to nothing
    assert launched[0].unread("deaf") < 12
    assert "nobody was looking" in visitor.results()[0]


def _slowly(step: Any) -> Any:
    def slow(pool: Any) -> Any:
        time.sleep(0.05)  # so that frames come one by one
        return step(pool)

    return slow


@pytest.mark.parametrize(
    ("client", "address"),
    [
        (("192.0.2.1", 5), "192.0.2.1"), (("2001:db8:1:2:3:4:5:6", 1), "2001:db8:1:2::/64"), (None, ""),
        (("::ffff:192.0.2.1", 1), "192.0.2.1"), (("fe80::1%eth0", 1), "fe80::/64"), (("socket", 0), "socket"),
    ],
)  # fmt: skip
def test_the_address_of_a_visitor(client: Any, address: str) -> None:
    assert address_of({"client": client}) == address
