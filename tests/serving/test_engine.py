"""The engine against calls of the model: mixed jobs of many clients, what they are told, and how they end."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.pipelines.test_masked import masked_folder  # noqa: F401  (a fixture)
from tests.pipelines.test_masked import pipe as masked_pipe  # noqa: F401
from visar.engine.session import RowsAreFixed
from visar.errors import VisarError
from visar.generation.model import ImageModel
from visar.generation.pool import Finished, Pool, Request
from visar.params import SamplingParams
from visar.serving.engine import Engine
from visar.serving.jobs import Busy, Closed, Event, Failed, Job, Late, Partial, Started

# ruff: noqa: F811 (fixtures that are imported)


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(rows=3, waiting=40, pools=2)
    yield made
    assert made.close(drain=False, timeout=60)


class Client:
    """One job, and what it is told."""

    def __init__(self, model: ImageModel, sampler: Any, request: Request, **options: Any):
        self.events: queue.Queue[Event] = queue.Queue()
        self.job = Job(model, model.sampler_of(sampler), request, self.events.put, **options)

    def all(self) -> list[Event]:
        """What it is told, until its end."""
        found = [self.events.get(timeout=60)]
        while not isinstance(found[-1], Finished | Failed):
            found.append(self.events.get(timeout=60))
        return found

    def error(self) -> BaseException:
        last = self.all()[-1]
        assert isinstance(last, Failed)
        return last.error


def same(client: Client, found: list[Event]) -> None:
    """The last event is the image of a call."""
    job, last = client.job, found[-1]
    assert isinstance(last, Finished), last
    out = job.model.generate(
        job.request.condition, job.request.params, sampler=job.sampler, first_image=job.request.image,
        output_type="tokens",
    )  # fmt: skip
    assert torch.equal(last.tokens, out.tokens[0]) and torch.equal(last.commit_pass, out.commit_pass[0])
    assert last.passes == out.stats.passes_per_image[0]


def test_images_are_those_of_calls(engine: Engine, text_pipe: Any, masked_pipe: Any) -> None:
    """Four samplers with two pools, one of them in lockstep, and a masked model beside them."""
    text, masked = ImageModel.of(text_pipe), ImageModel.of(masked_pipe)
    settings: list[dict[str, Any]] = [{}, {"seed": 5, "temperature": 0.7}, {"guidance_scale": 1.0}, {"top_k": 9}]
    clients = [
        Client(text, sampler, Request("red heart", SamplingParams(**given), i))
        for sampler in ("scd", "zipar", "ar", "sjd")
        for i, given in enumerate(settings)
    ]
    label = "red heart" if masked.family.condition == "prompt" else 1
    clients += [Client(masked, None, Request(label, SamplingParams(seed=s), 2)) for s in (1, 2)]
    engine.submit_all([client.job for client in clients])
    for client in clients:
        found = client.all()
        assert isinstance(found[0], Started) and len(found) == 2
        same(client, found)
    assert (engine.counts.finished, engine.running, engine.queued) == (len(clients), 0, 0)
    assert engine.counts.row_passes <= engine.counts.places <= engine.counts.passes * 3


@pytest.mark.parametrize("sampler", ["scd", "zipar"])
def test_partial_images_come_in_order(engine: Engine, text_pipe: Any, sampler: str) -> None:
    model = ImageModel.of(text_pipe)
    client = Client(model, sampler, Request("cat"), watch=lambda now: now.passes % 2 == 0)
    engine.submit(client.job)
    _, *partial, last = found = client.all()
    same(client, found)
    assert isinstance(last, Finished)
    assert partial
    for i, one in enumerate(partial, 1):
        assert isinstance(one, Partial) and one.at.passes == 2 * i
        assert not one.tokens.is_inference()
        known = one.commit_pass >= 0
        assert int(known.sum()) == one.at.committed and torch.equal(one.tokens[known], last.tokens[known])


def test_one_who_leaves_changes_nobody(engine: Engine, text_pipe: Any) -> None:
    model = ImageModel.of(text_pipe)
    leavers: list[Client] = []
    stayers: list[Client] = []
    for i in range(12):
        request = Request("blue star", SamplingParams(seed=i))
        if i % 3:
            stayers.append(Client(model, "scd", request))
            engine.submit(stayers[-1].job)
        else:

            def leave(now: Any, i: int = i, at: int = len(leavers)) -> bool:
                if now.passes > i // 6:
                    leavers[at].job.cancel()
                return False

            leavers.append(Client(model, "scd", request, watch=leave))
            engine.submit(leavers[-1].job)
    for client in stayers:
        same(client, client.all())
    assert engine.close(timeout=60) and engine.counts.cancelled == len(leavers) and engine.running == 0
    assert all(not isinstance(event, Finished) for client in leavers for event in client.events.queue)


def test_a_request_fails_alone(engine: Engine, text_pipe: Any) -> None:
    model = ImageModel.of(text_pipe)
    bad, good = Client(model, "scd", Request(" ")), Client(model, "scd", Request("cat"))
    engine.submit_all([bad.job, good.job])
    assert "empty" in str(bad.error()) and isinstance(good.all()[-1], Finished)
    with pytest.raises(VisarError, match="top_p must be above 0"):
        engine.submit(Client(model, "scd", Request("cat", SamplingParams(top_p=0.0))).job)


def test_a_broken_pass_fails_its_own(engine: Engine, text_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that raises ends the rows of its pool; the next jobs get a new one."""
    model, step = ImageModel.of(text_pipe), Pool.step
    first = Client(model, "scd", Request("cat"))

    def breaks(pool: Pool) -> Any:
        monkeypatch.setattr(Pool, "step", step)
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(Pool, "step", breaks)
    engine.submit(first.job)
    assert "device is gone" in str(first.error())
    again = Client(model, "scd", Request("cat"))
    engine.submit(again.job)
    same(again, again.all())


def test_rows_that_cannot_be_replaced_go_in_waves(
    engine: Engine, text_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fixed(pool: Pool, request: Request) -> int:
        raise RowsAreFixed("fixed")

    monkeypatch.setattr(Pool, "admit", fixed)
    model = ImageModel.of(text_pipe)
    clients = [Client(model, "scd", Request("cat", SamplingParams(seed=s))) for s in range(4)]
    engine.submit_all([client.job for client in clients])
    for client in clients:
        same(client, client.all())


def test_passes_on_a_cpu_have_the_rows_of_jobs_only(text_pipe: Any) -> None:
    """A row that waits would take as much time there as one at work."""
    model, hold, engine = ImageModel.of(text_pipe), threading.Event(), Engine(rows=4, waiting=9, pools=1)

    def held(now: Any) -> bool:
        hold.wait(60)
        return False

    first = Client(model, "ar", Request("cat"), watch=held)
    engine.submit(first.job)
    assert isinstance(first.events.get(timeout=60), Started)
    others = [Client(model, "ar", Request("cat", SamplingParams(seed=seed))) for seed in range(5)]
    engine.submit_all([client.job for client in others])
    hold.set()
    for client in (first, *others):
        same(client, client.all())
    assert [pool.size for pool in engine._pools.values()] == [4] and engine.close(timeout=60)
    # `ar` has 25 passes of an image.
    assert engine.counts.row_passes == engine.counts.places == 6 * 25 < engine.counts.passes * 4


def test_passes_of_a_wave_are_counted_whatever_becomes_of_it(engine: Engine, text_pipe: Any) -> None:
    model = ImageModel.of(text_pipe)
    whole = Client(model, "zipar", Request("cat"))
    engine.submit(whole.job)
    last = whole.all()[-1]
    assert isinstance(last, Finished)
    assert engine.counts.passes == engine.counts.row_passes == engine.counts.places == last.passes
    gone = threading.Event()

    def leave(now: Any) -> bool:
        if now.passes == 3:
            leaver.job.cancel()
            gone.set()
        return False

    leaver = Client(model, "zipar", Request("cat"), watch=leave)
    engine.submit(leaver.job)
    assert gone.wait(60) and engine.close(timeout=60)
    # It is looked at after each pass, before it is told of the pass.
    assert engine.counts.passes == engine.counts.row_passes == last.passes + 4 and engine.counts.cancelled == 1


def test_one_who_leaves_a_wave_is_not_counted_twice(engine: Engine, text_pipe: Any) -> None:
    model = ImageModel.of(text_pipe)

    def leave(now: Any) -> bool:
        leaver.job.cancel()
        return False

    leaver = Client(model, "zipar", Request("cat"), watch=leave)
    stays = Client(model, "zipar", Request("cat", SamplingParams(seed=1)))
    engine.submit_all([leaver.job, stays.job])
    same(stays, stays.all())
    assert (engine.counts.finished, engine.counts.cancelled) == (1, 1)


@pytest.mark.parametrize("sampler", ["scd", "zipar"])
def test_deadlines_full_lines_and_the_end(text_pipe: Any, sampler: str) -> None:
    model, hold = ImageModel.of(text_pipe), threading.Event()
    engine = Engine(rows=1, waiting=2)

    def held(now: Any) -> bool:
        hold.wait(60)
        return False

    first = Client(model, sampler, Request("cat"), watch=held)
    engine.submit(first.job)
    assert isinstance(first.events.get(timeout=60), Started)
    late = Client(model, sampler, Request("cat"), deadline=time.monotonic())
    last = Client(model, sampler, Request("blue star"))
    engine.submit_all([late.job, last.job])
    with pytest.raises(Busy, match="Too many requests are waiting"):
        engine.submit(Client(model, sampler, Request("cat")).job)
    assert (engine.running, engine.queued, engine.counts.refused) == (1, 2, 1)
    assert engine.stalled(0.0) and not engine.stalled(60)
    hold.set()
    assert isinstance(late.error(), Late)
    assert engine.close(timeout=60) and engine.stalled(60)  # drained
    assert isinstance(first.all()[-1], Finished) and isinstance(last.all()[-1], Finished)
    with pytest.raises(Closed, match="shutting down"):
        engine.submit(Client(model, sampler, Request("cat")).job)


def test_an_end_at_once(text_pipe: Any) -> None:
    model, engine = ImageModel.of(text_pipe), Engine(rows=1)
    clients = [Client(model, sampler, Request("cat")) for sampler in ("zipar", "scd", "scd")]
    engine.submit_all([client.job for client in clients])
    assert engine.close(drain=False, timeout=60)
    for client in clients:
        last = client.all()[-1]
        assert isinstance(last, Finished) or (isinstance(last, Failed) and isinstance(last.error, Closed))


@pytest.mark.parametrize("given", [{"rows": 0}, {"pools": 0}, {"waiting": -1}])
def test_what_an_engine_refuses(given: dict[str, int]) -> None:
    with pytest.raises(VisarError, match=r"must be [01] or more, not"):
        Engine(**given)
