"""The demo's jobs without a browser: what frames show, stops at every moment, and machines left free."""

# ruff: noqa: F811 (fixtures that are imported)
from __future__ import annotations

import gc
import threading
import time
import warnings
import weakref
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.stepped import LONG, Stepped, Watched, alone, assert_free, assert_same, job_of, request_of, until
from tests.pipelines.test_masked import masked_folder  # noqa: F401  (a fixture)
from tests.pipelines.test_masked import pipe as masked_pipe  # noqa: F401
from visar.demo import jobs
from visar.demo.desk import _decoding
from visar.demo.jobs import WARM, Job, Stopped
from visar.demo.models import DemoModel
from visar.errors import VisarError


@pytest.fixture
def stepped(text_pipe: Any) -> Stepped:
    return Stepped(text_pipe)


# Frames


@pytest.mark.parametrize("sampler", ["ar", "scd", "zipar", "mar"])
def test_frames_show_what_is_committed_and_the_last_one_the_images(
    text_pipe: Any, masked_pipe: Any, sampler: str
) -> None:
    pipe = masked_pipe if sampler == "mar" else text_pipe
    request = request_of(DemoModel("tiny", pipe.image_model), "red heart", sampler, images=2, seed=5)
    frames = list(Job(_decoding(request, request.samplers[0]), threading.Lock(), every=0).frames())
    last, out = frames[-1], alone(request)
    assert_same(last, out)
    assert last.notes == () and [f.stats for f in frames[:-1]] == [None] * (len(frames) - 1)
    passes = int(out.commit_pass.max()) + 1
    assert len(frames) == passes + 1 and last.passes == tuple(range(passes + 1))
    cell = out.images[0].width // pipe.image_model.family.layout.rows
    for n, frame in enumerate(frames[:-1], 1):
        decided = frame.commit_pass >= 0
        assert frame.passes == last.passes[: n + 1] and frame.tokens == last.tokens[: n + 1]
        assert frame.tokens[-1] > frame.tokens[-2] and frame.seconds[-1] >= frame.seconds[-2]
        assert torch.equal(decided, out.commit_pass < n)  # all that n passes committed, and no draft
        assert torch.equal(frame.commit_pass[decided], out.commit_pass[decided])
        if sampler != "zipar":  # which counts what has no gap before it
            assert frame.tokens[-1] == decided.sum(1).float().mean()
        for image, row in zip(frame.images, decided, strict=True):
            shown = np.asarray(image)[::cell, ::cell].reshape(-1, 3)
            assert (shown[~row.numpy()] == 128).all() and len(np.unique(shown[row.numpy()])) > 1
    assert last.tokens[0] == 0 and last.tokens[-1] == pipe.image_model.family.layout.length
    assert last.most == max(int((row == k).sum()) for row in out.commit_pass for k in range(passes))
    assert last.seconds[-1] <= last.stats.seconds  # type: ignore[union-attr]


def test_drawing_takes_nothing_from_the_time(text_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + drawn[0])
    monkeypatch.setattr("visar.engine.loop.time", clock)
    frames = []
    for frame in job_of(text_pipe, every=0).frames():
        drawn[0] += 1000
        frames.append(frame)
    last = frames[-1]
    assert drawn[0] == 26_000 and last.stats is not None
    assert 0 < last.seconds[-1] <= last.stats.seconds < 1000


def test_between_two_frames_there_is_time(text_pipe: Any) -> None:
    (only,) = job_of(text_pipe, every=LONG).frames()
    assert only.stats is not None and len(only.passes) == 26


def test_warm_passes_are_not_shown(stepped: Stepped) -> None:
    stepped.free()
    frames = list(job_of(stepped, every=0).frames())
    assert list(stepped.seen.queue) == [*range(1, WARM + 1), *range(1, 26)] and frames[0].passes == (0, 1)


# Stops


def test_a_stop_ends_it_within_a_pass(stepped: Stepped, text_pipe: Any) -> None:
    machine = threading.Lock()
    job = job_of(stepped, machine)
    watched = Watched(job.frames())
    stepped.passed(WARM)
    stepped.go.release()
    stepped.passed(4)
    job.stop()
    stepped.free()
    assert watched.stopped() == "Stopped after 4 passes." and stepped.seen.empty() and watched.frames == []
    assert_free(machine)
    assert_same(list(job_of(stepped, machine).frames())[-1], text_pipe("red heart", sampler="ar", seed=3))


def test_a_stop_while_it_warms_up(stepped: Stepped) -> None:
    job = job_of(stepped)
    watched = Watched(job.frames())
    stepped.passed(1)
    job.stop()
    stepped.free()
    assert watched.stopped() == "Stopped before it began." and stepped.seen.empty() and stepped.calls == 1


def test_a_stop_while_another_has_the_machine(stepped: Stepped) -> None:
    machine = threading.Lock()
    with machine:
        job = job_of(stepped, machine)
        watched = Watched(job.frames())
        job.stop()
        assert watched.stopped() == "Stopped before it began."
        until(lambda: job.over)  # the other is still at it
    assert stepped.calls == 0 and not machine.locked()


def test_a_job_that_was_stopped_before_makes_no_pass(stepped: Stepped) -> None:
    job = job_of(stepped)
    job.stop()
    with pytest.raises(Stopped, match="before it began"):
        next(job.frames())
    assert stepped.calls == 0


def test_a_stop_while_a_frame_is_drawn(text_pipe: Any) -> None:
    machine = threading.Lock()
    job = job_of(text_pipe, machine, every=0)
    frames = job.frames()
    assert next(frames).passes == (0, 1) and next(frames).passes == (0, 1, 2)
    job.stop()
    assert_free(machine)  # before anybody asks for the next one
    with pytest.raises(Stopped, match=r"^Stopped after 2 passes\.$"):
        next(frames)


def test_a_stop_after_the_last_pass_leaves_the_images(stepped: Stepped, text_pipe: Any) -> None:
    job = job_of(stepped, every=LONG)
    stepped.finish = job.stop
    stepped.free()
    (frame,) = job.frames()
    assert_same(frame, text_pipe("red heart", sampler="ar", seed=3))


def test_leaving_the_frames_frees_the_machine(stepped: Stepped) -> None:
    machine = threading.Lock()
    stepped.free()
    frames = job_of(stepped, machine, every=0).frames()
    next(frames)
    frames.close()
    assert_free(machine)
    assert max(stepped.seen.queue) == WARM


def test_frames_that_nobody_takes_free_the_machine(stepped: Stepped, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "PATIENCE", 0)
    machine = threading.Lock()
    stepped.free()
    job = job_of(stepped, machine, every=0)
    frames = job.frames()
    next(frames)  # and keep it, neither taking the next nor closing it
    until(lambda: job.over)
    assert not machine.locked() and list(stepped.seen.queue)[WARM:] == [1]
    with pytest.raises(Stopped, match="nobody was looking"):
        next(frames)


def test_it_may_take_so_long_and_no_longer(stepped: Stepped) -> None:
    machine = threading.Lock()
    stepped.free()
    with pytest.raises(VisarError, match=r"^Stopped after 0 seconds, the most that a decoding may take here\.$"):
        list(job_of(stepped, machine, limit=0).frames())
    assert list(stepped.seen.queue)[WARM:] == [1] and not machine.locked()


def test_all_end_when_the_server_does(stepped: Stepped) -> None:
    machine = threading.Lock()
    first, second = job_of(stepped, machine), job_of(stepped, machine)
    one = Watched(first.frames())
    stepped.passed(WARM)
    two = Watched(second.frames())
    until(lambda: second in jobs._at_work)
    ending = threading.Thread(target=jobs.end_all)
    ending.start()
    assert two.stopped() == "Stopped before it began."
    until(first._stop.is_set)
    assert ending.is_alive()  # it waits for the pass
    stepped.free()
    assert one.stopped() == "Stopped before it began."
    ending.join(LONG)
    assert not ending.is_alive() and first.over and second.over and jobs._at_work.isdisjoint({first, second})


# Errors and warnings


@pytest.mark.parametrize(
    "kind", [RuntimeError, torch.OutOfMemoryError, VisarError, KeyError, AssertionError, MemoryError, SystemExit]
)
def test_an_error_reaches_the_visitor_and_holds_nothing(kind: type[BaseException]) -> None:
    class Held:
        pass

    held = []

    def decode(callback: Any) -> Any:
        large = Held()
        held.append(weakref.ref(large))
        raise kind("no such luck")

    machine = threading.Lock()
    gc.disable()
    try:
        with pytest.raises(kind, match="no such luck"):
            list(Job(decode, machine).frames())
        until(lambda: held[0]() is None)  # a GPU would be full until the collector comes
    finally:
        gc.enable()
    assert not machine.locked()


def test_words_that_the_model_does_not_know_are_a_note(text_pipe: Any) -> None:
    (frame,) = job_of(text_pipe, prompt="a red zebra heart, 3d", every=LONG).frames()
    assert frame.notes == ("Words not known to this model were left out: zebra.",)
    (frame,) = job_of(text_pipe, prompt="red blue heart cat star zebra", every=LONG).frames()
    assert len(frame.notes) == 2 and frame.notes[1] == "Only the last 4 words of a long prompt are used."


def test_warnings_of_others_are_no_notes(text_pipe: Any) -> None:
    def decode(callback: Any) -> Any:
        other = threading.Thread(target=text_pipe, args=("red unheard",), kwargs=dict(output_type="tokens"))
        other.start()
        other.join(LONG)
        warnings.warn("of a library", stacklevel=1)
        return text_pipe("red zebra", sampler="ar", callback=callback)

    before = warnings.showwarning
    with warnings.catch_warnings(record=True) as elsewhere:
        warnings.simplefilter("always")
        (frame,) = Job(decode, threading.Lock(), every=LONG).frames()
    assert frame.notes == ("Words not known to this model were left out: zebra.",)
    assert {str(w.message) for w in elsewhere} == {
        "Words not known to this model were left out: unheard.",
        "of a library",
    }
    assert warnings.showwarning is before


def test_a_job_that_is_starting_ends_too(stepped: Stepped, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(stepped)
    start = job._thread.start
    stepped.free()
    with ThreadPoolExecutor() as pool:
        ends: list[Future[None]] = []

        def slowly() -> None:
            ends.append(pool.submit(jobs.end_all))
            wait(ends, 0.2)  # it must not go on before the thread runs
            start()

        monkeypatch.setattr(job._thread, "start", slowly)
        with suppress(Stopped):
            list(job.frames())
        ends[0].result(LONG)
    assert job.over
