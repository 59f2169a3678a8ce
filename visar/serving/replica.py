"""The models of this process behind one engine: what clients want becomes jobs, and what those tell becomes files.

Pixels and files are made in threads of their own, so that the engine's passes go on. A client that reads slowly holds
nothing up: of each image at most the newest preview and the file wait for it.
"""

from __future__ import annotations

import asyncio
import io
import logging
import math
import time
from collections.abc import AsyncGenerator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from visar.errors import NoDistribution, VisarError
from visar.eval.prompts import conditions
from visar.generation.model import ImageModel
from visar.generation.pool import Finished, Glance, Request, fits_pool
from visar.generation.progress import Progress, to_pil
from visar.generation.stats import exactness_of
from visar.params import SamplingParams
from visar.samplers import values_of
from visar.serving.engine import Engine
from visar.serving.jobs import Busy, Closed, Event, Failed, Job, Late, Partial, Started
from visar.serving.wanted import Accepted, Broken, Made, ModelCard, Preview, Refusal, SamplerCard, Told, Wanted

FORMS: Mapping[str, dict[str, Any]] = {"png": {}, "webp": {"lossless": True}, "jpeg": {"quality": 95}}
STALLED = 120.0  # seconds of a pass until the engine counts as ill; a first pass may compile
GRACE = 5.0  # seconds after a deadline, until which an engine is to tell that it has passed
ROOM = 0.2  # seconds between two looks whether there is any
LONGEST_WAIT = 60  # seconds, in Retry-After
THREADS = 2  # that make pixels and files
FAILURES = 5  # images in a row that the model could not make, from which on the engine counts as ill


@dataclass(frozen=True)
class Served:
    """A loaded model with the samplers that run for it, by what clients call them; the first is the default."""

    name: str
    model: ImageModel
    samplers: Mapping[str, Any]
    invariant: bool | None = None

    @property
    def card(self) -> ModelCard:
        family = self.model.family
        height, width = family.pixels
        cards = {
            label: SamplerCard(exactness_of(s), min(s.window, family.layout.length), values_of(s))
            for label, s in self.samplers.items()
        }
        return ModelCard(
            self.name, family.condition, family.classes, width, height, family.tokens, family.layout.length,
            str(family.dtype).removeprefix("torch."), cards, family.guided, family.scan,
        )  # fmt: skip


def named(models: Iterable[tuple[str, ImageModel]]) -> dict[str, ImageModel]:
    """Models by the names of their folders or files, with a number for equal ones."""
    found: dict[str, ImageModel] = {}
    for given, model in models:
        name = own = Path(given).name or given
        number = 1
        while name in found:
            number += 1
            name = f"{own}-{number}"
        model.bar = {"disable": True}
        found[name] = model
    return found


class Replica:
    """A `Studio` of the models in this process; `engine` is closed with it."""

    def __init__(self, models: Iterable[Served], engine: Engine):
        self.models = {served.name: served for served in models}
        self.cards = {name: served.card for name, served in self.models.items()}
        self.engine = engine
        self.warm = self.draining = False
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="visar files")
        self._usual = 1.0  # seconds of an image, from row to file
        self._open = 0  # calls of `images` that have not ended
        self._failed = 0  # images, since the last that was made

    async def images(self, wanted: Wanted) -> AsyncGenerator[Told, None]:
        """As `Studio.images`."""
        served = self.models[wanted.model]
        family = served.model.family
        # All that may be wrong with a prompt is said now: to the engine it would be a fault of the model.
        in_rows = fits_pool(served.model, served.samplers[wanted.sampler])
        (family.check_in_rows if in_rows else family.check_conditions)([wanted.condition])
        notes = [*family.left_out([wanted.condition]), *family.notes([wanted.condition])]
        mail = Mail()
        params = served.model.params_of(replace(wanted.params, invariant=served.invariant))
        until = time.monotonic() + wanted.seconds
        jobs = {
            image: Job(
                served.model, served.samplers[wanted.sampler], Request(wanted.condition, params, image),
                partial(mail.put, image), Steps(family.layout.length, wanted.previews) if wanted.previews else None,
                until,
            )
            for image in wanted.images
        }  # fmt: skip
        self.engine.submit_all(list(jobs.values()))
        self._open += 1
        waited: dict[int, float] = {}
        left = set(jobs)
        try:
            yield Accepted(params, tuple(notes))
            while left:
                image, event = await mail.next(until + GRACE)
                match event:
                    case Started():
                        waited[image] = event.waited
                    case Partial():
                        yield Preview(image, await self._file(wanted.form, partial(greyed, served.model, event)))
                    case Finished():
                        try:
                            file = await self._file(wanted.form, partial(drawn, served.model, event))
                        except Exception:
                            self._failed += 1
                            raise
                        seconds = time.monotonic() - jobs[image].began
                        self._usual += 0.2 * (seconds - waited[image] - self._usual)
                        left.remove(image)
                        self._failed = 0
                        yield Made(image, file, event.passes, event.nfe, waited[image], seconds)
                    case Failed():
                        if isinstance(event.error, NoDistribution) and (name := wanted.params.unusual()):
                            raise Refusal(
                                name, f"This model has no distribution at {name} {getattr(wanted.params, name):g}."
                            )
                        self._failed += not isinstance(event.error, Closed | Late)
                        raise blamed(event.error)
        finally:
            self._open -= 1
            for image in left:
                jobs[image].cancel()

    async def _file(self, form: str, make: Any) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(self._threads, encoded, make, form)

    async def warm_up(self) -> None:
        """Make an image with every sampler, so that nobody waits for what is done once; then it is ready."""
        try:
            for name, served in self.models.items():
                (condition,) = conditions(served.model, 1)
                for sampler in served.samplers:
                    await self._first(Wanted(name, sampler, condition, SamplingParams(), seconds=math.inf))
            self.warm = True
        except Closed:
            pass
        except Exception:
            logging.getLogger("visar").exception("The first image failed; the server will not be ready")

    async def _first(self, wanted: Wanted) -> None:
        """Make what is wanted, as soon as there is room: clients may come before it."""
        while True:
            try:
                async for _ in self.images(wanted):
                    pass
                return
            except Busy:
                await asyncio.sleep(ROOM)

    @property
    def retry_after(self) -> int:
        """Until about a row's worth of those in line are done."""
        rounds = 1 + self.engine.queued / self.engine.rows
        return max(1, min(LONGEST_WAIT, math.ceil(self._usual * rounds)))

    @property
    def problem(self) -> str:
        if self.draining:
            return ""
        if self.engine.stalled(STALLED):
            return f"The engine has ended, or spent over {STALLED:.0f} seconds in one pass."
        return f"The last {self._failed} images failed." if self._failed >= FAILURES else ""

    @property
    def ready(self) -> bool:
        return self.warm and not self.draining and not self.problem

    def close(self, seconds: float) -> bool:
        """Finish what was asked for within `seconds`, and take no more; whether all of it was done. Blocks."""
        self.draining, until = True, time.monotonic() + seconds
        drained = self.engine.close(timeout=seconds)
        if not drained:
            self.engine.close(drain=False, timeout=60)
        while drained and self._open and time.monotonic() < until:  # for pixels and files
            time.sleep(0.02)
        if done := drained and not self._open:
            self._threads.shutdown()
        return done


class Steps:
    """A `watch` that is true when another of `count` + 1 equal parts of the tokens is committed."""

    def __init__(self, length: int, count: int):
        self.length, self.parts, self.seen = length, count + 1, 0

    def __call__(self, now: Glance) -> bool:
        before, self.seen = self.seen, now.committed * self.parts // self.length
        return before < self.seen < self.parts


class Mail:
    """Events of several images for one coroutine; a preview that was not read gives way to the next."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[tuple[int, type], Event] = {}
        self._some = asyncio.Event()

    def put(self, image: int, event: Event) -> None:
        """From any thread."""
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._keep, image, event)

    def _keep(self, image: int, event: Event) -> None:
        self._waiting[image, type(event)] = event
        self._some.set()

    async def next(self, until: float) -> tuple[int, Event]:
        """The oldest. Raises `Late` where there is none at the time `until`."""
        while not self._waiting:
            self._some.clear()
            left = None if until == math.inf else until - time.monotonic()
            try:
                await asyncio.wait_for(self._some.wait(), left)
            except asyncio.TimeoutError:
                raise Late("The image was not ready in time, and the engine did not say why.") from None
        key = next(iter(self._waiting))
        return key[0], self._waiting.pop(key)


def blamed(error: BaseException) -> BaseException:
    """The error of a job, as `Studio.images` raises it. What a client asked for was checked before."""
    if isinstance(error, VisarError) and not isinstance(error, Closed | Late):
        return Broken(str(error))
    return error


def drawn(model: ImageModel, done: Finished) -> Image.Image:
    """The image of a job that is done; on a thread."""
    try:
        (image,) = to_pil(model.decode_tokens(done.tokens[None], [done.request.condition]))
    except VisarError as error:
        raise Broken(str(error)) from error
    return image


def greyed(model: ImageModel, now: Partial) -> Image.Image:
    """The image of a job at work, grey where no pass has committed a token; on a thread."""
    known = now.commit_pass[None] >= 0
    (image,) = Progress(
        now.at.passes, now.at.seconds, now.tokens[None], now.commit_pass[None], known.sum(1), known, model.family
    ).images()
    return image


def encoded(make: Any, form: str) -> bytes:
    """The file of the image that `make` gives."""
    buffer = io.BytesIO()
    make().save(buffer, form.upper(), **FORMS[form])
    return buffer.getvalue()
