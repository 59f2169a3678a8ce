"""The engine: one thread that decodes the jobs of all clients, in rows that never wait for one another.

Jobs with one sampler share a pool, whatever their other settings. Samplers whose rows go in lockstep decode in waves:
the jobs that wait for the same settings begin together. A job's image depends on nothing but its request.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, cast

from visar.engine.session import RowsAreFixed
from visar.errors import VisarError
from visar.generation.model import ImageModel
from visar.generation.pool import Finished, Glance, Pool, fits_pool, not_finite
from visar.generation.progress import Progress
from visar.serving.jobs import Busy, Closed, Event, Failed, Job, Late, Partial, Started


@dataclass
class Counts:
    """What an engine has done so far; `row_passes` are those of rows at work, of `places`, those of all rows."""

    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    late: int = 0
    refused: int = 0
    passes: int = 0
    row_passes: int = 0
    places: int = 0
    tokens: int = 0


class _Abandoned(Exception):
    """Nobody waits for a wave any more."""


class Engine:
    """At most `rows` images of a sampler at once, and `waiting` jobs in line before more are refused.

    `pools` bounds of how many samplers and models rows are kept in memory. It starts a thread at once, which ends with
    `close`. No weight of a model may change while it has jobs.
    """

    def __init__(self, *, rows: int = 8, waiting: int = 64, pools: int = 4):
        for name, value in (("rows", rows), ("pools", pools)):
            if value < 1:
                raise VisarError(f"{name} must be 1 or more, not {value}.")
        if waiting < 0:
            raise VisarError(f"waiting must be 0 or more, not {waiting}.")
        self.rows, self.waiting, self.pools = rows, waiting, pools
        self.counts = Counts()
        self.stepped = time.monotonic()  # when the last pass ended, or nothing was at work
        self._line: deque[Job] = deque()
        self._pools: dict[Hashable, Pool] = {}  # by kind of job; the last used is last
        self._fixed: set[Hashable] = set()  # samplers of models whose rows cannot be replaced
        self._wave: list[Job] = []
        self._change = threading.Condition()
        self._closing = self._at_once = False
        self._thread = threading.Thread(target=self._work, name="visar engine", daemon=True)
        self._thread.start()
        atexit.register(self.close, drain=False, timeout=60)  # Python must not exit while a thread runs torch

    # For clients, in any thread

    def submit(self, job: Job) -> None:
        """Put a job in line; raises as `submit_all`."""
        self.submit_all([job])

    def submit_all(self, jobs: list[Job]) -> None:
        """Put all jobs in line, or none.

        Raises `Busy` if there is no room, `Closed` after `close`, and `VisarError` for settings that a model lacks.
        """
        for job in jobs:
            job.request = replace(job.request, params=job.model.params_of(job.request.params))
        with self._change:
            if self._closing or not self._thread.is_alive():
                raise Closed("The server is shutting down, and takes no more requests.")
            room = self.waiting + self.rows - len(self._line) - self.running
            if len(jobs) > room:
                self.counts.refused += len(jobs)
                raise Busy("Too many requests are waiting; try again in a while.")
            for job in jobs:
                job.began = time.monotonic()
            self._line.extend(jobs)
            self._change.notify()

    def close(self, *, drain: bool = True, timeout: float | None = None) -> bool:
        """Take no more jobs, finish those there are, or fail them without `drain`; whether it ended in time."""
        with self._change:
            self._closing = True
            self._at_once |= not drain
            self._change.notify()
        self._thread.join(timeout)
        if ended := not self._thread.is_alive():
            atexit.unregister(self.close)
        return ended

    @property
    def queued(self) -> int:
        """Jobs that wait for a row."""
        return len(self._line)

    @property
    def running(self) -> int:
        """Jobs at work."""
        return len(self._wave) + sum(len(pool.rows) for pool in list(self._pools.values()))

    def stalled(self, seconds: float) -> bool:
        """Whether it works no more, or has spent `seconds` in one pass."""
        return not self._thread.is_alive() or (self.running > 0 and time.monotonic() - self.stepped > seconds)

    # The thread

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closing or self._line or self.running)
                if self._closing and not self._line and not self.running:
                    return
            self.stepped = time.monotonic()
            try:
                self._turn()
                if wave := self._next_wave():
                    self._run_wave(wave)
            except Exception as error:  # a mistake in visar: no client may wait for ever
                logging.getLogger("visar").exception("The engine failed")
                self._lose_all(error)

    def _turn(self) -> None:
        """Admit what fits, and run a pass of every pool, or a few on a GPU."""
        self._drop()
        self._admit()
        for key, pool in list(self._pools.items()):
            if not pool.rows:
                continue
            before = pool.passes, pool.row_passes, pool.places
            try:
                done, failed = pool.step()
            except Exception as error:
                del self._pools[key]
                self._lose([taken.request.tag for taken in pool.rows.values()], error)
                continue
            self.stepped = time.monotonic()
            self.counts.passes += pool.passes - before[0]
            self.counts.row_passes += pool.row_passes - before[1]
            self.counts.places += pool.places - before[2]
            for finished in done:
                self._finish(finished.request.tag, finished)
            self._lose([request.tag for request in failed], not_finite(pool.family))
            for row, taken in pool.rows.items():
                job = taken.request.tag
                if job.watch is not None and job.watch(now := pool.glance(row)):
                    tokens, commit_pass = pool.read(row)
                    self._tell(job, Partial(tokens, commit_pass, now))

    def _drop(self) -> None:
        """Let go of the jobs that nobody waits for any more."""
        self._take([job for job in self._waiting() if self._gone(job)])
        for pool in self._pools.values():
            for row in [row for row, taken in pool.rows.items() if self._gone(taken.request.tag)]:
                pool.release(row)

    def _waiting(self) -> list[Job]:
        with self._change:
            return list(self._line)

    def _take(self, jobs: Iterable[Job]) -> None:
        """Out of the line."""
        with self._change:
            for job in jobs:
                self._line.remove(job)

    def _gone(self, job: Job) -> bool:
        """Whether a job is to end without its image; it is counted and told."""
        if job.cancelled:
            self.counts.cancelled += 1
        elif job.deadline <= time.monotonic():
            self.counts.late += 1
            self._tell(job, Failed(Late("The image was not ready in time; ask again, or allow more time.")))
        elif self._at_once:
            self._lose([job], Closed("The server is shutting down."))
        else:
            return False
        return True

    def _admit(self) -> None:
        """Give rows to the first in line that fit; none overtakes a job that waits for a pool to be dropped."""
        for job in self._waiting():
            if not self._in_rows(job):
                continue
            try:
                if (pool := self._pool_of(job)) is None:
                    return
                if not pool.free:
                    continue
                pool.admit(replace(job.request, tag=job))
            except RowsAreFixed:
                self._fixed.add((job.model, job.sampler))
                continue
            except Exception as error:
                self._take([job])
                self._lose([job], error)
                continue
            self._take([job])
            self._tell(job, Started(time.monotonic() - job.began))

    def _in_rows(self, job: Job) -> bool:
        return fits_pool(job.model, job.sampler) and (job.model, job.sampler) not in self._fixed

    def _pool_of(self, job: Job) -> Pool | None:
        """The pool of a job's kind, or None if there is no room for another one yet."""
        kind = _kind(job)
        if (found := self._pools.pop(kind, None)) is None:
            if len(self._pools) >= self.pools:
                if (idle := next((k for k, pool in self._pools.items() if not pool.rows), None)) is None:
                    return None
                del self._pools[idle]
            _, _, guided, invariant = kind
            found = Pool(job.model, job.sampler, size=self.rows, guided=guided, invariant=invariant)
        self._pools[kind] = found
        return found

    # Waves

    def _next_wave(self) -> list[Job]:
        """Those in line for the first lockstep sampler's settings, out of the line."""
        lockstep = [job for job in self._waiting() if not self._in_rows(job)]
        alike = [job for job in lockstep if _settings(job) == _settings(lockstep[0])][: self.rows]
        self._take(alike)
        return alike

    def _run_wave(self, wave: list[Job]) -> None:
        """Decode the jobs as one batch; pools go on between its passes."""
        first = wave[0]
        self._wave = list(wave)
        for job in wave:
            self._tell(job, Started(time.monotonic() - job.began))
        try:
            out = first.model.generate(
                [job.request.condition for job in wave],
                replace(first.request.params, seed=[cast(int, job.request.params.seed) for job in wave]),
                sampler=first.sampler,
                first_image=[job.request.image for job in wave],
                output_type="tokens",
                callback=self._between(wave),
            )
            left = self._wave  # without those that ended before
        except _Abandoned:
            return
        except Exception as error:
            self._lose(self._wave, error)
            return
        finally:
            self._wave = []
        stats, batch = out.stats, len(wave)
        drafting = None if stats.draft_seconds is None else stats.draft_seconds / batch
        for row, job in enumerate(wave):
            if job not in left:
                continue
            self._finish(
                job,
                Finished(
                    job.request, out.tokens[row], out.commit_pass[row], stats.passes_per_image[row], stats.nfe,
                    stats.seconds / batch, drafting,
                ),
            )  # fmt: skip

    def _between(self, wave: list[Job]) -> Callable[[Progress], None]:
        seen, working = 0, len(wave)

        def after_pass(progress: Progress) -> None:
            nonlocal seen, working
            self.stepped = time.monotonic()
            # Now and not at the end, which a wave that is abandoned, or fails, does not reach.
            passes, seen = progress.passes - seen, progress.passes
            self.counts.passes += passes
            self.counts.row_passes += passes * working
            self.counts.places += passes * len(wave)
            for row, job in enumerate(wave):
                if job not in self._wave:
                    continue
                at = Glance(int(progress.lengths[row]), progress.passes, progress.seconds / len(wave))
                if self._gone(job):
                    self._wave.remove(job)
                elif job.watch is not None and job.watch(at):
                    self._tell(job, Partial(progress.tokens[row], progress.commit_pass[row], at))
            if not self._wave:
                raise _Abandoned
            unfinished = (progress.lengths < progress.commit_pass.shape[1]).tolist()
            working = sum(more and job in self._wave for more, job in zip(unfinished, wave, strict=True))
            self._turn()

        return after_pass

    # Ends

    def _finish(self, job: Job, finished: Finished) -> None:
        self.counts.finished += 1
        self.counts.tokens += len(finished.commit_pass)
        self._tell(job, finished._replace(request=job.request))

    def _lose(self, jobs: Iterable[Job], error: BaseException) -> None:
        for job in list(jobs):
            self.counts.failed += 1
            self._tell(job, Failed(error))

    def _lose_all(self, error: BaseException) -> None:
        self._take(line := self._waiting())
        at_work = [taken.request.tag for pool in self._pools.values() for taken in pool.rows.values()]
        self._pools.clear()
        self._lose([*line, *at_work], error)

    def _tell(self, job: Job, event: Event) -> None:
        if not job.cancelled:
            job.tell(event)


def _kind(job: Job) -> tuple[ImageModel, Any, bool, bool]:
    """Equal for jobs that can share a pool."""
    params = job.request.params
    return job.model, job.sampler, params.guidance_scale != 1, bool(params.invariant)


def _settings(job: Job) -> tuple[Any, ...]:
    """Equal for jobs that can be one batch of a lockstep sampler."""
    params = job.request.params
    values = [(f.name, getattr(params, f.name)) for f in fields(params) if f.name not in ("seed", "forced_tokens")]
    return job.model, job.sampler, *values, id(params.forced_tokens)
