"""The demo's desk and jobs without a browser: strangers at once, stops at every moment, and machines left free."""

from __future__ import annotations

import gc
import queue
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_masked_pipelines import masked_folder  # noqa: F401  (a fixture)

from visar.demo import desk as desk_module
from visar.demo import jobs
from visar.demo.desk import Desk
from visar.demo.jobs import WARM, Frame, Job, Stopped
from visar.demo.models import DemoModel, named
from visar.demo.requests import Limits, Request, checked
from visar.errors import VisarError
from visar.pipelines import TextToImagePipeline

LONG = 60  # seconds until a test gives up waiting for a thread


class Stepped:
    """A pipeline whose passes are let go one by one; `seen` has the number of each when it is over."""

    def __init__(self, pipe: Any):
        self.pipe, self.seen, self.go = pipe, queue.Queue[int](), threading.Semaphore(0)
        self.calls = self.inside = self.most_inside = 0
        self.finish: Callable[[], object] = lambda: None  # done before the pictures are handed over

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)

    def free(self) -> None:
        """Let all passes go."""
        self.go.release(100_000)

    def passed(self, count: int) -> None:
        """Let all but the last of `count` passes go, and wait until that one is over; it waits in turn."""
        for number in range(count):
            self.seen.get(timeout=LONG)
            if number < count - 1:
                self.go.release()

    def __call__(self, *conditions: Any, callback: Any, **settings: Any) -> Any:
        def after(progress: Any) -> None:
            self.seen.put(progress.passes)
            assert self.go.acquire(timeout=LONG)
            callback(progress)

        self.calls += 1
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        try:
            out = self.pipe(*conditions, callback=after, **settings)
            self.finish()
            return out
        finally:
            self.inside -= 1


class Watched(threading.Thread):
    """Takes all frames in a thread of its own, as the page does for each visitor."""

    def __init__(self, frames: Iterator[Any]):
        super().__init__(daemon=True)
        self.source, self.frames, self.error = frames, [], None  # type: ignore[var-annotated]
        self.start()

    def run(self) -> None:
        try:
            for frame in self.source:
                self.frames.append(frame)
        except Exception as error:
            self.error = error

    def ended(self) -> Watched:
        self.join(LONG)
        assert not self.is_alive()
        return self

    def stopped(self) -> str:
        assert isinstance(self.ended().error, Stopped), self.error
        return str(self.error)


def pixels(pictures: Any) -> list[bytes]:
    return [p.tobytes() for p in pictures]


def assert_same(frame: Frame, out: Any) -> None:
    """A last frame has the pictures of the pipeline alone."""
    assert frame.stats is not None and pixels(frame.pictures) == pixels(out.images)
    assert torch.equal(frame.commit_pass, out.commit_pass) and frame.stats.nfe == out.stats.nfe
    assert (frame.stats.seed, frame.stats.sampler) == (out.stats.seed, out.stats.sampler)


def job_of(pipe: Any, machine: threading.Lock | None = None, prompt: str = "red heart", **options: Any) -> Job:
    return Job(
        lambda callback: pipe(prompt, sampler="ar", seed=3, callback=callback), machine or threading.Lock(), **options
    )


def request_of(model: DemoModel, prompt: str = "red heart", *samplers: str, **values: Any) -> Request:
    given: Any = dict(label=3, images=1, seed=0, guidance=2.0, temperature=1.0) | values
    chosen = [(s, {"steps": 4, "head_steps": 6, "window": 6}) for s in samplers or ("ar",)]
    return checked(model, prompt, samplers=chosen, limits=Limits(), **given)


def alone(request: Request, number: int = 0) -> Any:
    """What the pipeline itself makes of a request."""
    pipe: Any = getattr(request.model.pipe, "pipe", request.model.pipe)
    return pipe(
        request.condition, sampler=request.samplers[number], seed=request.seed, guidance_scale=request.guidance,
        temperature=request.temperature, num_images_per_prompt=request.images,
    )  # fmt: skip


def assert_free(machine: threading.Lock) -> None:
    assert machine.acquire(timeout=LONG)
    machine.release()


@pytest.fixture
def masked_pipe(masked_folder: Any) -> Any:  # noqa: F811
    made = TextToImagePipeline.from_pretrained(masked_folder)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def stepped(text_pipe: Any) -> Stepped:
    return Stepped(text_pipe)


@pytest.fixture
def model(stepped: Stepped) -> DemoModel:
    return DemoModel("tiny", stepped)  # type: ignore[arg-type]


@pytest.fixture
def desk() -> Desk:
    return Desk(Limits())


# Frames


@pytest.mark.parametrize("sampler", ["ar", "scd", "zipar", "mar"])
def test_frames_show_what_is_committed_and_the_last_one_the_pictures(
    text_pipe: Any, masked_pipe: Any, sampler: str
) -> None:
    pipe = masked_pipe if sampler == "mar" else text_pipe
    request = request_of(DemoModel("tiny", pipe), "red heart", sampler, images=2, seed=5)
    frames = list(Job(desk_module._decoding(request, request.samplers[0]), threading.Lock(), every=0).frames())
    last, out = frames[-1], alone(request)
    assert_same(last, out)
    assert last.notes == () and [f.stats for f in frames[:-1]] == [None] * (len(frames) - 1)
    passes = int(out.commit_pass.max()) + 1
    assert len(frames) == passes + 1 and last.passes == tuple(range(passes + 1))
    cell = out.images[0].width // pipe.grid
    for n, frame in enumerate(frames[:-1], 1):
        decided = frame.commit_pass >= 0
        assert frame.passes == last.passes[: n + 1] and frame.tokens == last.tokens[: n + 1]
        assert frame.tokens[-1] > frame.tokens[-2] and frame.seconds[-1] >= frame.seconds[-2]
        assert torch.equal(decided, out.commit_pass < n)  # all that n passes committed, and no draft
        assert torch.equal(frame.commit_pass[decided], out.commit_pass[decided])
        if sampler != "zipar":  # which counts what has no gap before it
            assert frame.tokens[-1] == decided.sum(1).float().mean()
        for picture, row in zip(frame.pictures, decided, strict=True):
            shown = np.asarray(picture)[::cell, ::cell].reshape(-1, 3)
            assert (shown[~row.numpy()] == 128).all() and len(np.unique(shown[row.numpy()])) > 1
    assert last.tokens[0] == 0 and last.tokens[-1] == pipe.grid**2
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
        assert watched.stopped() == "Stopped before it began." and job.over  # the other is still at it
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


def test_a_stop_after_the_last_pass_leaves_the_pictures(stepped: Stepped, text_pipe: Any) -> None:
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
    frames.close()  # type: ignore[attr-defined]
    assert_free(machine)
    assert max(stepped.seen.queue) == WARM


def test_frames_that_nobody_takes_free_the_machine(stepped: Stepped, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "PATIENCE", 0.2)
    machine = threading.Lock()
    stepped.free()
    job = job_of(stepped, machine, every=0)
    frames = job.frames()
    next(frames)  # and keep it, neither taking the next nor closing it
    assert_free(machine)
    assert job.over and list(stepped.seen.queue)[-1] == 1
    with pytest.raises(Stopped, match="nobody was looking"):
        next(frames)


def test_it_may_take_so_long_and_no_longer(stepped: Stepped) -> None:
    machine = threading.Lock()
    stepped.free()
    with pytest.raises(VisarError, match=r"^Stopped after 0 seconds, the most that a decoding may take here\.$"):
        list(job_of(stepped, machine, limit=0).frames())
    assert list(stepped.seen.queue)[WARM:] == [1] and not machine.locked()


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
        sleeping = time.monotonic() + LONG
        while held[0]() is not None and time.monotonic() < sleeping:  # until the thread is gone as well
            time.sleep(0.01)
        assert held[0]() is None  # a GPU would be full until the collector comes
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
        "Words not known to this model were left out: unheard.", "of a library",
    }  # fmt: skip
    assert warnings.showwarning is before


# Visitors


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
    request = request_of(DemoModel("tiny", text_pipe), "blue cat", "ar", "scd", seed=7, images=2)
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
    assert_free(desk._machine)
    assert_same(list(desk.serve(asked_when_free(desk, wanted)))[-1][1], alone(wanted))
    left.close()  # type: ignore[attr-defined]


def asked_when_free(desk: Desk, wanted: Request) -> str:
    """The thread of a job that was stopped takes a moment to end."""
    until = time.monotonic() + LONG
    while True:
        try:
            return desk.ask("me", wanted)
        except VisarError:
            assert time.monotonic() < until
            time.sleep(0.01)


def test_leaving_a_request_frees_the_machine_for_the_next(desk: Desk, model: DemoModel, stepped: Stepped) -> None:
    stepped.go.release(WARM + 2)
    frames = desk.serve(name := desk.ask("gone", request_of(model)))
    watched = Watched(frames)
    stepped.passed(1)
    desk.stop("gone")  # as the page does when a window is closed
    stepped.free()
    watched.stopped()
    with pytest.raises(VisarError, match="not known any more"):
        desk.request(name)
    wanted = request_of(model, "star")
    assert_same(list(desk.serve(desk.ask("next", wanted)))[-1][1], alone(wanted))


def test_a_ticket_serves_once(desk: Desk, model: DemoModel, stepped: Stepped) -> None:
    name = desk.ask("me", request_of(model))
    one = Watched(desk.serve(name))
    stepped.passed(2)
    with pytest.raises(VisarError, match="not known any more"):  # at once, from another window
        next(desk.serve(name))
    stepped.free()
    assert one.ended().error is None and one.frames[-1][1].stats is not None
    for used in (name, "", "0" * 32):
        with pytest.raises(VisarError, match="not known any more"):
            next(desk.serve(used))
        with pytest.raises(VisarError, match="not known any more"):
            desk.request(used)


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
