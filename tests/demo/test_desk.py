"""The demo's desk without a browser: strangers at once get what they asked for, and nobody stops anybody else."""

# ruff: noqa: F811 (fixtures that are imported)
from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.helpers.stepped import LONG, Stepped, Watched, alone, assert_same, request_of, until
from tests.pipelines.test_masked import masked_folder  # noqa: F401  (a fixture)
from tests.pipelines.test_masked import pipe as masked_pipe  # noqa: F401
from visar.demo import desk as desk_module
from visar.demo import jobs
from visar.demo.desk import Desk
from visar.demo.jobs import WARM, Job, Stopped
from visar.demo.models import DemoModel, named
from visar.demo.requests import Limits
from visar.errors import VisarError


@pytest.fixture
def stepped(text_pipe: Any) -> Stepped:
    return Stepped(text_pipe)


@pytest.fixture
def model(stepped: Stepped) -> DemoModel:
    return DemoModel("tiny", stepped)  # type: ignore[arg-type]


@pytest.fixture
def desk() -> Desk:
    return Desk(Limits())


@pytest.mark.filterwarnings("ignore:Words not known")
def test_strangers_at_once_get_what_they_asked_for(
    desk: Desk, text_pipe: Any, class_pipe: Any, masked_pipe: Any
) -> None:
    stepped = Stepped(text_pipe)
    stepped.free()
    models = [DemoModel("words", stepped), *named([("classes", class_pipe), ("masked", masked_pipe)]).values()]  # type: ignore[arg-type]
    prompts, samplers = ("red heart", "blue cat", "star zebra"), (("scd", "ar"), ("sjd",), ("mar",))
    wanted = [
        request_of(model, prompts[k % 3], *own, seed=10 + k % 4, label=k, images=1 + k % 2, temperature=0.8 + k / 10)
        for model, own in zip(models, samplers, strict=True)
        for k in range(4)
    ]
    together = threading.Barrier(len(wanted))

    def visit(number: int) -> Iterator[Any]:
        together.wait(LONG)
        yield from desk.serve(desk.ask(f"visitor {number}", wanted[number]))

    for request, visitor in zip(wanted, [Watched(visit(n)) for n in range(len(wanted))], strict=True):
        assert visitor.ended().error is None
        last = {number: frame for number, frame in visitor.frames}
        assert list(last) == list(range(len(request.samplers)))
        for number, frame in last.items():
            assert_same(frame, alone(request, number))
            assert frame.notes == (
                ("Words not known to this model were left out: zebra.",) if "zebra" in request.title else ()
            )
    assert stepped.calls > 0 and stepped.most_inside == 1  # turns were taken


def test_a_comparison_runs_both_at_equal_seeds(desk: Desk, text_pipe: Any) -> None:
    request = request_of(DemoModel("tiny", text_pipe.image_model), "blue cat", "ar", "scd", seed=7, images=2)
    frames = list(desk.serve(desk.ask("me", request)))
    numbers = [number for number, _ in frames]
    assert numbers == sorted(numbers) and set(numbers) == {0, 1}
    for number, name in enumerate(("ar", "scd")):
        last = next(f for n, f in frames if n == number and f.stats is not None)
        assert_same(last, text_pipe("blue cat", sampler=request.samplers[number], seed=7, num_images_per_prompt=2))
        assert last.stats is not None and last.stats.sampler == name


def test_a_stop_between_the_samplers_of_a_comparison(desk: Desk, model: DemoModel, stepped: Stepped) -> None:
    stepped.free()
    frames = desk.serve(desk.ask("me", request_of(model, "blue cat", "ar", "scd")))
    while next(frames)[1].stats is None:
        pass
    calls = stepped.calls
    assert desk.stop("me") == "work"
    with pytest.raises(Stopped, match=r"^Stopped before scd began\.$"):
        next(frames)
    assert stepped.calls == calls


def test_a_visitor_stops_nobody_else(desk: Desk, model: DemoModel, stepped: Stepped) -> None:
    first, second = request_of(model, "red heart", seed=1), request_of(model, "blue cat", seed=2)
    one = Watched(desk.serve(desk.ask("one", first)))
    stepped.passed(WARM + 1)
    waiting = desk.ask("two", second)
    assert desk.stop("three") == ""
    assert desk.stop("two") == "waiting" and desk.stop("two") == ""
    stepped.free()
    assert_same(one.ended().frames[-1][1], alone(first))
    assert one.error is None
    with pytest.raises(Stopped, match="before it began"):
        list(desk.serve(waiting))
    assert_same(list(desk.serve(desk.ask("two", second)))[-1][1], alone(second))


def test_a_stop_of_ones_own_and_the_next_request(desk: Desk, model: DemoModel, stepped: Stepped) -> None:
    one = Watched(desk.serve(desk.ask("one", request_of(model))))
    stepped.passed(WARM + 1)
    assert desk.stop("one") == "work"
    stepped.free()
    assert one.stopped() == "Stopped after 1 pass." and desk.stop("one") == ""
    again = request_of(model, "star")
    assert_same(list(desk.serve(desk.ask("one", again)))[-1][1], alone(again))


def test_a_second_request_takes_the_place_of_one_that_waits(desk: Desk, model: DemoModel, stepped: Stepped) -> None:
    stepped.free()
    old = desk.ask("me", request_of(model, "red heart"))
    new = desk.ask("me", wanted := request_of(model, "blue cat"))
    assert desk.request(new) is wanted
    with pytest.raises(Stopped, match="before it began"):
        list(desk.serve(old))
    assert stepped.calls == 0
    assert_same(list(desk.serve(new))[-1][1], alone(wanted))


def test_a_second_request_while_the_first_is_at_work(desk: Desk, model: DemoModel, stepped: Stepped) -> None:
    first = request_of(model)
    one = Watched(desk.serve(desk.ask("me", first)))
    stepped.passed(2)
    with pytest.raises(VisarError, match="still at work; stop it first"):
        desk.ask("me", request_of(model, "star"))
    other = desk.ask("another", request_of(model, "star"))
    stepped.free()
    assert_same(one.ended().frames[-1][1], alone(first))  # it was not touched
    assert desk.stop("another") == "waiting" and desk.request(other).title == "star"


def test_frames_that_were_left_lying_lock_nobody_out(
    desk: Desk, model: DemoModel, stepped: Stepped, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that broke: its generator is neither read nor closed."""
    monkeypatch.setattr(Job.__init__, "__defaults__", (0.0, 600))
    stepped.free()
    left = desk.serve(desk.ask("me", request_of(model)))
    next(left)
    with pytest.raises(VisarError, match="still at work"):
        desk.ask("me", request_of(model))
    assert desk.stop("me") == "work"
    wanted = request_of(model, "blue cat")
    until(lambda: not jobs._at_work)
    assert_same(list(desk.serve(desk.ask("me", wanted)))[-1][1], alone(wanted))
    left.close()


def test_leaving_a_request_frees_the_machine_for_the_next(desk: Desk, model: DemoModel, stepped: Stepped) -> None:
    stepped.go.release(WARM + 2)
    watched = Watched(desk.serve(desk.ask("gone", request_of(model))))
    stepped.passed(1)
    desk.stop("gone")  # as the page does when a window is closed
    stepped.free()
    watched.stopped()
    assert desk.stop("gone") == ""
    wanted = request_of(model, "star")
    assert_same(list(desk.serve(desk.ask("next", wanted)))[-1][1], alone(wanted))


def test_a_ticket_serves_once(desk: Desk, model: DemoModel, stepped: Stepped) -> None:
    name = desk.ask("me", wanted := request_of(model))
    one = Watched(desk.serve(name))
    stepped.passed(2)
    assert list(desk.serve(name)) == []  # at once, from another window
    stepped.free()
    assert_same(one.ended().frames[-1][1], alone(wanted))
    calls = stepped.calls
    assert list(desk.serve(name)) == [] and stepped.calls == calls and desk.stop("me") == ""
    for unknown in ("", "0" * 32):
        with pytest.raises(VisarError, match="not known any more"):
            next(desk.serve(unknown))
        with pytest.raises(VisarError, match="not known any more"):
            desk.request(unknown)


def test_tickets_do_not_pile_up_and_nobody_pushes_others_out(
    desk: Desk, model: DemoModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk_module, "TICKETS", 8)
    request = request_of(model)
    others = [desk.ask(f"other {k}", request) for k in range(4)]
    greedy = [desk.ask("greedy", request) for _ in range(40)]
    assert len(set(greedy)) == 40 and len(desk._tickets) == 8
    for name in [*others, greedy[-1]]:
        assert desk.request(name) is request
    flood = [desk.ask(f"visitor {k}", request) for k in range(20)]
    assert len(desk._tickets) == 8 and all(name in desk._tickets for name in flood[-8:])


def test_one_address_with_many_names_pushes_nobody_out(
    desk: Desk, model: DemoModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk_module, "TICKETS", 8)
    request = request_of(model)
    others = [desk.ask(f"other {k}", request, address=f"192.0.2.{k}") for k in range(4)]
    for k in range(40):
        desk.ask(f"name {k}", request, address="203.0.113.5")
    assert len(desk._tickets) == 8 and all(name in desk._tickets for name in others)


def test_the_newest_ticket_of_a_tab(desk: Desk, model: DemoModel) -> None:
    request = request_of(model)
    assert desk.newest("me", "generate") == ""
    desk.ask("me", request, tab="generate")
    newest = desk.ask("me", request, tab="generate")
    other = desk.ask("me", request, tab="compare")
    desk.ask("you", request, tab="generate")
    assert desk.newest("me", "generate") == newest and desk.newest("me", "compare") == other


@pytest.mark.parametrize("error", [RuntimeError("cuda"), VisarError("No."), torch.OutOfMemoryError("full")])
def test_a_request_that_fails_leaves_the_desk_as_it_was(
    desk: Desk, model: DemoModel, stepped: Stepped, error: Exception
) -> None:
    def fail() -> None:
        raise error

    stepped.free()
    stepped.finish = fail
    with pytest.raises(type(error)):
        list(desk.serve(desk.ask("me", request_of(model))))
    stepped.finish = lambda: None
    wanted = request_of(model, "star", seed=9)
    assert_same(list(desk.serve(desk.ask("me", wanted)))[-1][1], alone(wanted))
