"""A pool: rows of one model that decode a request each, and take the next one as soon as they are done."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from visar.engine.graphs import cuda_graph
from visar.engine.guidance import Guidance, RowGuidance
from visar.engine.memory import check_memory
from visar.engine.session import Session
from visar.engine.slots import Slots
from visar.errors import NoDistribution, VisarError
from visar.families.base import DiscreteFamily, Encoded
from visar.generation.discrete import arranged, guidance_of, target_of
from visar.generation.model import ImageModel, undisturbed
from visar.generation.rows import noise_of
from visar.generation.sessions import Call, marks
from visar.kernels.derived import Steady, steady_weights
from visar.params import DISCRETE, SamplingParams
from visar.samplers import RowTargets, Target


@dataclass(frozen=True)
class Request:
    """One image of a prompt or class id: the same as `ImageModel.generate` makes with `first_image=image`.

    `tag` is the caller's own, to know it again.
    """

    condition: Any
    params: SamplingParams = field(default_factory=SamplingParams)
    image: int = 0
    tag: Any = None


class Glance(NamedTuple):
    """How far a request is: `committed` tokens after `passes`, and its share of their `seconds`."""

    committed: int
    passes: int
    seconds: float


class Finished(NamedTuple):
    """`tokens` [N] and `commit_pass` [N] of a request after `passes` of its row and `nfe` with its prefill.

    `seconds` are its share of the pool's passes: those of a pass over the rows that were taken; `draft_seconds` of them
    were the drafter's, None if CUDA graphs hide it.
    """

    request: Request
    tokens: Tensor
    commit_pass: Tensor
    passes: int
    nfe: int
    seconds: float
    draft_seconds: float | None


@dataclass
class _Taken:
    request: Request
    prefill_passes: int
    passes: int = 0
    seconds: float = 0.0
    draft_seconds: float = 0.0


class Pool:
    """`size` rows of a model of discrete tokens, all with one sampler; each request has settings of its own.

    `rows` are the requests at work by row; `passes` counts those of the pool, `row_passes` those of rows at work, and
    `places` those of all rows that were computed. With `guided`, both batches of guidance run for all rows, whatever
    their scale. Raises `VisarError` for a sampler whose rows go in lockstep. No weight may change while rows are at
    work. `invariant` says for all of them whether kernels are (`SamplingParams.invariant`).
    """

    def __init__(
        self, model: ImageModel, sampler: Any = None, *, size: int = 8, guided: bool = True, invariant: bool = False
    ):
        if size < 1:
            raise VisarError(f"A pool has 1 row or more, not {size}.")
        self.model, self.sampler = model, model.sampler_of(sampler)
        if not fits_pool(model, self.sampler):
            raise VisarError(f"Sampler {self.sampler.name!r} decodes all rows in lockstep; give it batches.")
        self.family, self.size = cast(DiscreteFamily, model.family), size
        self.guided, self.params = guided, SamplingParams(invariant=invariant)
        self.rows: dict[int, _Taken] = {}
        self.passes = self.row_passes = self.places = 0
        self._slots: Slots | None = None
        self._scratch: Session | None = None
        self._steady = Steady()
        self._marks: Hashable = None

    @property
    def free(self) -> int:
        """How many rows wait for a request."""
        return self.size - len(self.rows)

    def run(self, requests: Iterable[Request]) -> Iterator[Finished]:
        """All requests, each given when it is done. Raises `VisarError` if one is refused, or fails."""
        waiting, more = iter(requests), True
        while more or self.rows:
            while more and self.free:
                if (request := next(waiting, None)) is None:
                    more = False
                else:
                    self.admit(request)
            done, failed = self.step()
            yield from done
            if failed:
                raise not_finite(self.family)

    def admit(self, request: Request) -> int:
        """Give a request a free row, and return its number. Raises `VisarError` if it is refused."""
        params = self.model.params_of(request.params)
        guidance, target = guidance_of(params), target_of(self.family, params)
        if guidance.active and not self.guided:
            raise VisarError("This pool has no guidance; give guidance_scale 1.")
        if bool(params.invariant) != self.params.invariant:
            raise VisarError(f"This pool has invariant {self.params.invariant}; a request cannot choose it.")
        device = self.family.device
        if not self.rows:
            self.model.check_modules()
            self._steady = Steady()
            if (now := marks(self.family, self.model.drafters.of(self.sampler))) != self._marks:
                self._slots = self._scratch = None  # made of modules as they were
                self._marks = now
        with self._at_work(), torch.inference_mode():
            noise = noise_of([request.condition], request.image, params.seed or 0, device)
            encoded = self.family.widened(self.family.encode([request.condition]))
            encoded = arranged(encoded, self.family, params, noise)
            fresh = self._fresh(encoded)
            if self._slots is None:
                self._slots = self._made(encoded)
            row = min(self._slots.free)
            self._slots.admit(row, fresh, target, guidance, noise)
        self.rows[row] = _Taken(request, fresh.prefill_passes)
        return row

    def step(self) -> tuple[list[Finished], list[Request]]:
        """Run a pass, or a few on a GPU: the requests that are done, and those that failed; both leave their rows."""
        if not self.rows or self._slots is None:
            return [], []
        slots, drafter = self._slots, self._slots.session.drafter
        drafting = 0.0 if drafter is None else drafter.seconds
        start = time.perf_counter()
        with self._at_work():
            done, failed = slots.step()  # which waits for the device
        seconds = time.perf_counter() - start
        self.passes += slots.every
        self.row_passes += slots.every * len(self.rows)
        self.places += slots.every * slots.session.batch
        for taken in self.rows.values():
            taken.passes += slots.every
            taken.seconds += seconds / len(self.rows)
            taken.draft_seconds += (0.0 if drafter is None else drafter.seconds - drafting) / len(self.rows)
        finished = [self._finished(row) for row in done]
        lost = [self.rows[row].request for row in failed]
        for row in [*done, *failed]:
            self.release(row)
        return finished, lost

    def glance(self, row: int) -> Glance:
        """How far the request in a row was after the last step."""
        assert self._slots is not None
        taken = self.rows[row]
        return Glance(self._slots.seen[row], taken.passes, taken.seconds)

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Copies of a row's tokens [N], drafts included, and of the pass that committed each [N], -1 for drafts."""
        assert self._slots is not None
        found = self._slots.read(row)
        with torch.inference_mode(False):  # outputs are ordinary tensors
            return found.tokens.clone(), found.commit_pass.clone()

    def release(self, row: int) -> None:
        """Free a row, whether its image is done or not."""
        assert self._slots is not None
        self._slots.release(row)
        del self.rows[row]

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        with steady_weights(self._steady), undisturbed(self.family.device), self.model.invariant(self.params):
            yield

    def _finished(self, row: int) -> Finished:
        assert self._slots is not None
        taken, slots = self.rows[row], self._slots
        tokens, commit_pass = self.read(row)
        passes = int(commit_pass.max()) + 1
        hidden = slots.graph is not None and slots.session.drafter is not None
        return Finished(
            taken.request, tokens, commit_pass, passes, passes + taken.prefill_passes, taken.seconds,
            None if hidden else taken.draft_seconds,
        )  # fmt: skip

    def _fresh(self, encoded: Encoded) -> Session:
        """A session of one row that has just started."""
        if self._scratch is None:
            self._scratch = self._session(encoded)
        else:
            self._scratch.start(*encoded)
            if self._scratch.drafter is not None:
                self._scratch.drafter.start(*encoded)
        return self._scratch

    def _made(self, encoded: Encoded) -> Slots:
        """All rows as free slots; until they are taken they hold this condition."""
        family, device = self.family, self.family.device
        check_memory(family.bytes_per_image(self.sampler.window, self.guided), self.size, device)  # at first of all
        session = self._session(tuple(e.expand(self.size, *e.shape[1:]) for e in encoded))
        targets = RowTargets(self.size, family.layout.length, device, family.allowed)
        noise = noise_of([0] * self.size, [0] * self.size, 0, device)
        capture = self.model.sessions.capture or (cuda_graph if device.type == "cuda" else None)
        if not getattr(self.sampler, "capturable", True):
            capture = None
        return Slots(session, self.sampler, targets, noise, capture=capture)

    def _session(self, encoded: Encoded) -> Session:
        guidance = RowGuidance(len(encoded[0]), self.family.device) if self.guided else Guidance()
        drafter = self.model.drafters.of(self.sampler)
        return Call(self.family, drafter, encoded, self.sampler, Target(), guidance).session()


def not_finite(family: DiscreteFamily) -> VisarError:
    """The error of a request whose distribution was none."""
    name = str(family.dtype).removeprefix("torch.")
    or_else = ", or too large for the guidance scale and temperature"
    if family.dtype == torch.float16:
        or_else = "; load the model in bfloat16 or float32"
    return NoDistribution(f"The model's logits are not finite in {name}{or_else}.")


def fits_pool(model: ImageModel, sampler: Any) -> bool:
    """Whether a sampler's rows may begin and end at different times."""
    return model.family.tokens == DISCRETE and not getattr(sampler, "lockstep", False)
