"""What the tests of the demo share: a pipeline whose passes are let go one by one, and watchers of frames."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from visar.demo.jobs import Frame, Job, Stopped
from visar.demo.models import DemoModel
from visar.demo.requests import Limits, Request, checked
from visar.generation.model import ImageModel

LONG = 600  # seconds until a test gives up waiting, on however busy a machine; nothing is measured by it


class Stepped:
    """A model whose passes are let go one by one; `seen` has the number of each when it is over."""

    def __init__(self, pipe: Any):
        self.model, self.seen, self.go = ImageModel.of(pipe), queue.Queue[int](), threading.Semaphore(0)
        self.calls = self.inside = self.most_inside = 0
        self.finish: Callable[[], object] = lambda: None  # done before the images are handed over

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def free(self) -> None:
        """Let all passes go."""
        self.go.release(100_000)

    def passed(self, count: int) -> None:
        """Let all but the last of `count` passes go, and wait until that one is over; it waits in turn."""
        for number in range(count):
            self.seen.get(timeout=LONG)
            if number < count - 1:
                self.go.release()

    def generate(self, *conditions: Any, callback: Any, **settings: Any) -> Any:
        def after(progress: Any) -> None:
            self.seen.put(progress.passes)
            assert self.go.acquire(timeout=LONG)
            callback(progress)

        self.calls += 1
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        try:
            out = self.model.generate(*conditions, callback=after, **settings)
            self.finish()
            return out
        finally:
            self.inside -= 1

    __call__ = generate


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


def pixels(images: Any) -> list[bytes]:
    return [p.tobytes() for p in images]


def assert_same(frame: Frame, out: Any) -> None:
    """A last frame has the images of the pipeline alone."""
    assert frame.stats is not None and pixels(frame.images) == pixels(out.images)
    assert torch.equal(frame.commit_pass, out.commit_pass) and frame.stats.nfe == out.stats.nfe
    assert (frame.stats.seed, frame.stats.sampler) == (out.stats.seed, out.stats.sampler)


def job_of(pipe: Any, machine: threading.Lock | None = None, prompt: str = "red heart", **options: Any) -> Job:
    return Job(
        lambda callback: pipe(prompt, sampler="ar", seed=3, callback=callback), machine or threading.Lock(), **options
    )


def request_of(model: DemoModel, prompt: str = "red heart", *samplers: str, **values: Any) -> Request:
    settings: Any = dict(seed=0, guidance_scale=2.0, guidance_schedule="linear", temperature=1.0, top_k=0, top_p=1.0)
    settings |= {name: values.pop(name) for name in settings if name in values}
    chosen = [(s, {"steps": 4, "head_steps": 6, "window": 6}) for s in samplers or ("ar",)]
    given: Any = dict(label=3, images=1) | values
    return checked(model, prompt, samplers=chosen, settings=settings, limits=Limits(), **given)


def alone(request: Request, number: int = 0) -> Any:
    """What the model itself makes of a request."""
    model: Any = request.model.model
    model = model.model if isinstance(model, Stepped) else model
    return model.generate(
        request.condition,
        sampler=request.samplers[number],
        num_images=request.images,
        params=request.params,
    )


def until(condition: Callable[[], Any]) -> None:
    """Wait for what another thread is about to do."""
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def assert_free(machine: threading.Lock) -> None:
    assert machine.acquire(timeout=LONG)
    machine.release()


def hears_interrupts() -> None:
    """Run in a new process: a shell's background jobs, and what they start, would ignore ^C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
