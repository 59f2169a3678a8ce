"""One decoding in its own thread: it gives frames, and can be stopped between two passes."""

from __future__ import annotations

import queue
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

import visar
from visar.errors import VisarError
from visar.generation.output import ImageOutput
from visar.generation.progress import Progress, StepCallback
from visar.generation.stats import DecodeStats

WARM = 3  # passes before the clock starts
PATIENCE = 30.0  # seconds that a frame waits for the page
BEFORE = "Stopped before it began."

Decode = Callable[[StepCallback], ImageOutput]
_at_work: set[Job] = set()
_starting = threading.Lock()  # a job among those at work has a thread that runs


class Stopped(Exception):
    """The job was stopped before its images were done."""


@dataclass(frozen=True)
class Frame:
    """The state of B images: the images, `commit_pass` [B, N], and the series of committed tokens.

    After `passes[i]` passes and `seconds[i]`, `tokens[i]` tokens of an image were committed, the mean over the batch.
    The last frame has `stats`; `notes` are sentences for the visitor.
    """

    images: list[Image.Image]
    commit_pass: Tensor
    passes: tuple[int, ...]
    seconds: tuple[float, ...]
    tokens: tuple[float, ...]
    stats: DecodeStats | None = None
    notes: tuple[str, ...] = ()

    @property
    def most(self) -> int:
        """The most tokens of one image that one pass committed; 1 before the first."""
        return max((int(row[row >= 0].bincount().max()) for row in self.commit_pass if (row >= 0).any()), default=1)


class Job:
    """`decode` makes the images and calls back after every pass; there is a frame every `every` seconds.

    Decoding pauses while a frame is made and shown, so that rendering does not affect its time. It is stopped by
    `stop`, by leaving the loop over `frames`, when a frame is not taken for `PATIENCE` seconds, and after `limit`
    seconds, with a `VisarError`. It begins when it has the lock `machine`.
    """

    def __init__(self, decode: Decode, machine: threading.Lock, every: float = 0.3, limit: float = 600):
        self.decode, self.machine, self.every, self.limit = decode, machine, every, limit
        self._stop, self._taken = threading.Event(), threading.Event()
        self._frames: queue.Queue[Frame | BaseException] = queue.Queue()
        self._passes, self._seconds, self._tokens = [0], [0.0], [0.0]
        self._began = self._shown = 0.0
        self._over, self._thread = threading.Event(), threading.Thread(target=self._run, daemon=True)

    @property
    def over(self) -> bool:
        """Whether it has ended, and released the machine."""
        return self._over.is_set()

    def stop(self) -> None:
        """End after the current pass."""
        self._stop.set()

    def frames(self) -> Generator[Frame, None, None]:
        """Frames until the last one, which has `stats`. Raises `Stopped`, or the decoding's exception."""
        with _starting:
            _at_work.add(self)
            self._thread.start()
        try:
            while True:
                found = self._frames.get()
                if isinstance(found, BaseException):
                    try:
                        raise found
                    finally:
                        del found  # its traceback refers to this frame: a cycle that would hold the decoding's memory
                yield found
                self._taken.set()
                if found.stats is not None:
                    return
        finally:
            self.stop()

    def _run(self) -> None:
        try:
            with self._turn(), warned() as notes:
                warm_up(self.decode, self._stop)
                if self._stop.is_set():
                    raise Stopped(BEFORE)
                self._began = self._shown = time.monotonic()
                out = self.decode(self._after_pass)
            self._frames.put(self._last(out, tuple(dict.fromkeys(notes))))
        except BaseException as error:
            self._frames.put(error)
        finally:
            self._over.set()
            _at_work.discard(self)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait for the machine and hold it. Raises `Stopped` if the job is stopped before."""
        while not self.machine.acquire(timeout=0.05):
            if self._stop.is_set():
                raise Stopped(BEFORE)
        try:
            if self._stop.is_set():
                raise Stopped(BEFORE)
            yield
        finally:
            self.machine.release()

    def _after_pass(self, progress: Progress) -> None:
        self._go_on(progress)
        if time.monotonic() - self._began > self.limit:
            raise VisarError(f"Stopped after {self.limit:g} seconds, the most that a decoding may take here.")
        self._passes.append(progress.passes)
        self._seconds.append(progress.seconds)
        self._tokens.append(float(progress.lengths.float().mean()))
        if time.monotonic() - self._shown >= self.every:
            self._taken.clear()
            self._frames.put(Frame(progress.images(), progress.commit_pass.cpu(), *self._series()))
            patience = time.monotonic() + PATIENCE
            while not self._taken.wait(0.05):
                self._go_on(progress)
                if time.monotonic() > patience:
                    raise Stopped("Stopped, because nobody was looking.")
            self._shown = time.monotonic()

    def _go_on(self, progress: Progress) -> None:
        if self._stop.is_set():
            n = progress.passes
            raise Stopped(f"Stopped after {n} pass{'es' if n > 1 else ''}.")

    def _last(self, out: ImageOutput, notes: tuple[str, ...]) -> Frame:
        assert isinstance(out.images, list)
        return Frame(out.images, out.commit_pass.cpu(), *self._series(), stats=out.stats, notes=notes)

    def _series(self) -> tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...]]:
        return tuple(self._passes), tuple(self._seconds), tuple(self._tokens)


def end_all(seconds: float = 60) -> None:
    """Stop all jobs and wait for their ends: Python must not exit while a thread runs torch."""
    with _starting:
        jobs = list(_at_work)
    for job in jobs:
        job.stop()
    for job in jobs:
        job._thread.join(seconds)


def warm_up(decode: Decode, stopped: threading.Event) -> None:
    """Run a few passes, so that one-time work (packing weights, first launches) is not timed."""

    def enough(progress: Progress) -> None:
        if progress.passes >= WARM or stopped.is_set():
            raise Stopped

    with suppress(Stopped):
        decode(enough)


@contextmanager
def warned() -> Iterator[list[str]]:
    """The warnings of visar in this thread during the block; other warnings are not changed."""
    said: list[str] = []
    mine, package = threading.get_ident(), str(Path(visar.__file__).parent)
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        elsewhere = warnings.showwarning

        # Filters and this hook are global, so warnings of other threads come here too.
        def show(message: Any, category: type[Warning], filename: str, *rest: Any) -> None:
            if category is UserWarning and threading.get_ident() == mine and filename.startswith(package):
                said.append(str(message))
            else:
                elsewhere(message, category, filename, *rest)

        warnings.showwarning = show  # type: ignore[assignment]
        yield said
