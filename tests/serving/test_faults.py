"""What happens when: the table of docs/serving.md, line by line, over real sockets."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.api import KEY, LONG, Api, Held, bearer, serving, until
from visar.engine.slots import Slots
from visar.generation.pool import Glance, Pool
from visar.pipelines import TextToImagePipeline
from visar.serving import replica
from visar.serving.jobs import Late, Partial
from visar.serving.replica import FAILURES, Mail, Steps

Start = Callable[..., Api]


@pytest.fixture
def start(text_folder: Path) -> Iterator[Start]:
    """Servers of the text model; with the fixture `held`, their passes wait to be let go."""
    with ExitStack() as stack:

        def started(samplers: tuple[str, ...] = ("scd", "ar"), **options: Any) -> Api:
            pipe = TextToImagePipeline.from_pretrained(text_folder)
            return stack.enter_context(serving(("text", pipe, samplers), **options))

        yield started


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    made = Held(monkeypatch)
    yield made
    made.go()


# The engine


def test_a_full_queue(start: Start, held: Held) -> None:
    api = start(rows=1, waiting=1)
    first = [api.later(prompt="cat", seed=i) for i in range(2)]
    until(lambda: api.engine.running + api.engine.queued == 2)
    for more in ({}, {"stream": True}):
        answer = api.images(prompt="cat", **more)
        assert answer.status == 429 and answer.error["code"] == "queue_full"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert 'visar_images_total{outcome="refused"} 2.0' in api.ask("/metrics").body.decode()
    held.go()
    assert [one.answer.status for one in first] == [200, 200]


def test_more_images_than_there_is_room_for(start: Start, held: Held) -> None:
    """All of a request, or none."""
    api = start(rows=1, waiting=1)
    assert api.images(prompt="cat", n=3).status == 429 and api.engine.queued == 0


def test_a_deadline(start: Start, held: Held) -> None:
    api = start(rows=1, deadline=0.2)
    plain, stream = api.later(prompt="cat"), api.later(prompt="cat", stream=True)
    until(lambda: held.steps)
    time.sleep(0.3)
    held.go()
    answer = plain.answer
    assert answer.status == 504 and answer.error["code"] == "deadline_exceeded"
    assert stream.answer.events[-1]["error"]["code"] == "deadline_exceeded"
    until(lambda: api.engine.running == 0)
    assert api.engine.counts.late == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(start: Start, held: Held, stream: bool) -> None:
    """At work, in a stream, and while it waits; others get their images."""
    api = start(rows=1)
    at_work = api.open(prompt="cat", stream=stream)
    until(lambda: held.steps == 1)
    waiting = api.open(prompt="cat", stream=stream)
    until(lambda: api.engine.queued == 1)
    stays = api.later(prompt="red heart", seed=5)
    until(lambda: api.engine.queued == 2)
    waiting.close()
    at_work.close()
    time.sleep(0.2)  # until the server has noticed; else they would be done, and the counts below show it
    held.go()
    assert stays.answer.status == 200
    assert (api.engine.counts.cancelled, api.engine.counts.finished) == (2, 1)
    assert (api.engine.running, api.engine.queued) == (0, 0)


def test_a_client_that_leaves_in_the_middle_of_a_stream(start: Start, held: Held) -> None:
    api = start(rows=1)
    with api.open(prompt="cat", stream=True, partial_images=3, sampler="ar") as connection:
        held.go(8)
        found = b""
        while b"partial_image" not in found:
            found += connection.recv(65536)
        assert api.engine.running == 1
    time.sleep(0.2)
    held.go()
    until(lambda: api.engine.running == 0)
    assert (api.engine.counts.cancelled, api.engine.counts.finished) == (1, 0)


def test_a_slow_client_holds_nobody_up(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that reads nothing of its stream: its rows are free, others are served, and after a while it is left."""
    file = replica.encoded

    def large(make: Any, form: str) -> bytes:
        return file(make, form).ljust(8_000_000 if form == "webp" else 0)

    monkeypatch.setattr(replica, "encoded", large)
    api = start(rows=1)
    slow = api.open(prompt="cat", n=3, stream=True, partial_images=1, output_format="webp", receive=1024)
    for seed in range(3):
        assert api.images(prompt="red heart", seed=seed).status == 200
    until(lambda: api.engine.counts.finished == 6)
    sent = 'visar_image_seconds_count{model="text",sampler="scd"}'
    assert api.engine.running == 0 and measured(api, sent) < 6  # it waits for its client
    slow.close()
    until(lambda: not api.server.server_state.tasks)
    monkeypatch.setattr("visar.serving.app.UNREAD", 0.1)
    with api.open(prompt="cat", n=3, stream=True, output_format="webp", receive=1024):
        until(lambda: api.engine.counts.finished == 9)
        until(lambda: not api.server.server_state.tasks)
    assert "Traceback" not in caplog.text


def test_mail_keeps_the_newest_preview_only() -> None:
    def partial(passes: int) -> Partial:
        return Partial(torch.zeros(1), torch.zeros(1), Glance(passes, passes, 0.0))

    async def read() -> list[tuple[int, int]]:
        mail = Mail()
        for passes in range(1000):
            mail.put(passes % 2, partial(passes))
        await asyncio.sleep(0)
        found = [await mail.next(time.monotonic() + LONG) for _ in range(2)]
        with pytest.raises(Late, match="did not say why"):
            await mail.next(time.monotonic())
        return [(image, event.at.passes) for image, event in found if isinstance(event, Partial)]

    assert asyncio.run(read()) == [(0, 998), (1, 999)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_previews_are_evenly_spread(count: int) -> None:
    watch = Steps(24, count)
    seen = [n for n in range(25) if watch(Glance(n, n, 0.0))]
    assert seen == [24 // (count + 1) * (i + 1) for i in range(count)]
    assert [Steps(24, count)(Glance(n, 1, 0.0)) for n in (0, 24)] == [False, False]


def test_one_row_of_nan(
    start: Start, held: Held, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It fails alone, while the others of the same passes get their images."""
    api, step = start(rows=3), Slots.step
    asked = [api.later(prompt="cat", seed=0)]
    until(lambda: held.steps)
    asked += [api.later(prompt="cat", seed=seed) for seed in (1, 2)]
    until(lambda: api.engine.queued == 2)
    held.go(1)
    until(lambda: api.engine.running == 3)

    def spoilt(slots: Slots) -> Any:
        if slots.session.batch == 1:  # that of the first, which has no row next to it
            return step(slots)
        monkeypatch.setattr(Slots, "step", step)
        with torch.inference_mode():
            slots.session.condition[1] = torch.nan  # type: ignore[attr-defined]
        return step(slots)

    monkeypatch.setattr(Slots, "step", spoilt)
    held.go()
    failed = [one.answer for one in asked if one.answer.status != 200]
    assert [one.status for one in failed] == [500] and "not finite" in failed[0].error["message"]
    assert api.engine.counts.failed == 1 and "not finite" in caplog.text
    assert api.images(prompt="cat", n=3).status == 200


def test_a_mistake_in_visar(start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The client gets a sentence, the log has the cause, and the next request is served."""
    api = start()
    step = Pool.step

    def breaks(pool: Pool) -> Any:
        raise RuntimeError("the device at /secret/path is gone")

    monkeypatch.setattr(Pool, "step", breaks)
    answer = api.images(prompt="cat")
    assert answer.status == 500 and answer.error["message"] == "This failed on the server; its log says why."
    assert b"secret" not in answer.body and "/secret/path" in caplog.text
    monkeypatch.setattr("visar.serving.body.ImagesBody.wanted", lambda *_, **__: 1 / 0)
    assert api.images(prompt="cat").status == 500
    monkeypatch.undo()
    assert step is Pool.step and api.images(prompt="cat").status == 200


def test_health_tells_the_truth(start: Start, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    api = start(rows=1)
    assert api.ask("/health").status == api.ask("/ready").status == 200
    api.replica.warm = False
    assert api.ask("/ready").status == 503 and api.ask("/health").status == 200
    api.replica.warm = True
    waiting = api.later(prompt="cat")
    until(lambda: held.steps)
    monkeypatch.setattr("visar.serving.replica.STALLED", 0.0)
    for path, status, code in (("/health", 500, "unhealthy"), ("/ready", 503, "not_ready")):
        answer = api.ask(path)
        assert answer.status == status and answer.error["code"] == code
    held.go()
    assert waiting.answer.status == 200
    until(lambda: api.engine.running == 0)
    assert api.ask("/health").status == 200
    api.engine.close(timeout=LONG)
    assert api.ask("/health").status == 500


@pytest.mark.parametrize("place", ["visar.generation.pool.Pool.step", "visar.serving.replica.drawn"])
def test_health_when_every_image_fails(start: Start, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its passes or at its pixels. A deadline is no failure of the model."""
    api = start()
    monkeypatch.setattr(place, lambda *_: 1 / 0)
    for _ in range(FAILURES):
        assert api.ask("/health").status == 200
        assert api.images(prompt="cat").status == 500
    assert api.ask("/health").status == 500 and "last 5 images failed" in api.ask("/health").error["message"]
    monkeypatch.undo()
    assert api.images(prompt="cat").status == 200 and api.ask("/health").status == 200


@pytest.mark.parametrize("sampler", ["scd", "zipar"])
def test_settings_that_overflow_are_the_clients_fault(start: Start, sampler: str) -> None:
    api = start(samplers=(sampler,))
    for _ in range(FAILURES):
        answer = api.images(prompt="cat", guidance_scale=1e38, temperature=1e-5)
        assert answer.status == 400 and answer.error["param"] == "guidance_scale"
        assert "no distribution at guidance_scale 1e+38" in answer.error["message"]
    assert api.ask("/health").status == 200 and api.ask("/ready").status == 200
    assert api.images(prompt="cat", top_k=10**30).status == 200


def test_the_first_images_make_it_ready(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    api = start()
    api.replica.warm = False
    asyncio.run(api.replica.warm_up())
    assert api.ask("/ready").status == 200 and api.engine.counts.finished == 2  # one by each sampler


def test_the_first_images_wait_for_room(start: Start, held: Held) -> None:
    """Clients that came before them do not leave a server that is never ready."""
    api = start(rows=1, waiting=0)
    api.replica.warm = False
    asked = api.later(prompt="cat")
    until(lambda: held.steps)
    first = threading.Thread(target=lambda: asyncio.run(api.replica.warm_up()))
    first.start()
    until(lambda: api.engine.counts.refused)
    held.go()
    first.join(LONG)
    assert asked.answer.status == 200 and api.ask("/ready").status == 200


def test_a_front_that_knows_no_models_yet(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    api = start()
    monkeypatch.setattr(api.replica, "cards", {})
    for more in ({}, {"model": "text"}):
        answer = api.images(prompt="cat", **more)
        assert answer.status == 503 and answer.error["code"] == "not_ready" and answer.headers["retry-after"]


def test_a_first_image_that_fails(start: Start, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    api = start()
    api.replica.warm = False
    api.replica.models["text"].model.family.model.norm.weight.data[0] = torch.nan
    asyncio.run(api.replica.warm_up())
    assert api.ask("/ready").status == 503 and "The first image failed" in caplog.text


# The end


def test_the_end_finishes_what_was_begun(start: Start, held: Held) -> None:
    """At work and waiting; new requests get 503 until then, over new connections too."""
    api = start(rows=1)
    begun = [api.later(prompt="cat", seed=1), api.later(prompt="cat", seed=2, stream=True)]
    until(lambda: api.engine.running + api.engine.queued == 2 and held.steps)
    api.server.handle_exit(signal.SIGTERM, None)
    until(lambda: api.replica.draining)
    until(lambda: api.images(prompt="cat").status == 503)
    answer = api.images(prompt="cat")
    assert answer.error["code"] == "shutting_down" and api.ask("/ready").status == 503
    assert api.ask("/health").status == 200
    held.go()
    assert begun[0].answer.status == 200
    assert begun[1].answer.events[-1]["type"] == "image_generation.completed"
    until(lambda: api.server.should_exit)


def test_the_end_waits_for_pixels(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some decoders take longer for them than answers have that are on their way."""
    go, file = threading.Event(), replica.encoded

    def slow(make: Any, form: str) -> bytes:
        assert go.wait(LONG)
        return file(make, form)

    monkeypatch.setattr(replica, "encoded", slow)
    monkeypatch.setattr("visar.serving.server.LAST_WORDS", 0.1)
    api = start()
    asked = api.later(prompt="cat")
    until(lambda: api.engine.counts.finished)
    api.server.handle_exit(signal.SIGTERM, None)
    time.sleep(0.5)
    go.set()
    assert asked.answer.status == 200
    until(lambda: api.server.should_exit)


def test_an_end_that_takes_too_long(start: Start, held: Held) -> None:
    api = start(rows=1, drain=0.1)
    begun = [api.later(prompt="cat", seed=seed) for seed in range(2)]
    until(lambda: api.engine.running + api.engine.queued == 2 and held.steps)
    api.server.handle_exit(signal.SIGTERM, None)
    until(lambda: api.engine._at_once)
    held.go()
    assert {one.answer.status for one in begun} == {503}


def test_sigterm_under_load(text_folder: Path, tmp_path: Path) -> None:
    """The command itself: every image that was begun arrives, and the exit code is 0."""
    words = ["serve", "--model", str(text_folder), "--dtype", "float32", "--port", "0", "--rows", "1"]
    server = subprocess.Popen(
        [sys.executable, "-m", "visar", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "VISAR_API_KEY": KEY}, cwd=tmp_path,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        told = server.stdout.readline()
        assert told.startswith("visar serve: text on http://127.0.0.1:") and told.endswith("/v1\n"), told
        api = Api(int(told.rpartition(":")[2].partition("/")[0]), None, None, bearer(KEY))  # type: ignore[arg-type]
        asked = [api.later(prompt="cat", n=10, seed=seed, stream=True) for seed in range(3)]
        until(lambda: measured(api, 'visar_images_total{outcome="finished"}') >= 2)
        server.send_signal(signal.SIGTERM)
        for one in asked:
            assert [event["type"] for event in one.answer.events] == ["image_generation.completed"] * 10
        assert server.wait(LONG) == 0
    finally:
        server.kill()
        _, said = server.communicate()
    assert said == "visar serve: finishing what was begun; another Ctrl-C ends it at once\n"


def measured(api: Api, name: str) -> float:
    """A line of `/metrics`."""
    lines = [line.rpartition(" ") for line in api.ask("/metrics").body.decode().splitlines()]
    return next((float(value) for found, _, value in lines if found == name), 0.0)
