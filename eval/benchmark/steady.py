"""The time of a pass in the middle of an image, through the same loop that decodes images.

The cache that a pass reads grows with the image; in the middle it has its mean length. So the rows are moved there
without decoding what comes before, and put back whenever they come near the end: any number of passes can be timed, and
all of them take as long as the mean pass. The values of the tokens do not matter for that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch

from visar.engine.graphs import Graph
from visar.engine.loop import Snapshot, decode
from visar.engine.rng import Noise
from visar.engine.session import Session
from visar.errors import VisarError
from visar.host import synchronize
from visar.samplers import Target


class _Enough(Exception):
    """Ends a decoding whose image nobody wants."""


@dataclass(frozen=True)
class Steady:
    """`capture_seconds`: of a CUDA graph, None where none was captured."""

    ms_per_pass: float
    passes: int
    capture_seconds: float | None = None


@torch.inference_mode()
def steady(
    session: Session,
    sampler: Any,
    target: Target,
    noise: Noise,
    *,
    passes: int,
    warm: int = 2,
    every: int | None = None,
    graph: Graph | None = None,
    traced: Callable[[], AbstractContextManager[Any]] | None = None,
) -> Steady:
    """Time `passes` passes of `sampler` after `warm` others, on a fresh session.

    Its rows are moved to the middle of the image as soon as the host takes part.

    `every`: after how many passes the host takes part, and rows are put back; by default each on a CPU and every
    fourth on a GPU, and both counts are rounded up to multiples of it. A `graph` is captured before the first pass that
    is timed, if `warm` is 3 or more. `traced()` is entered for as many passes more, after those that are timed. Raises
    `VisarError` where the decoding ends too early.
    """
    every = every or (1 if session.device.type == "cpu" else 4)
    passes, warm = (-(-n // every) * every for n in (passes, warm))
    middle = session.length // 2
    last = max(middle, session.length - every * sampler.window)  # from where the next check would find rows complete
    start = end = 0.0
    tracing: AbstractContextManager[Any] = nullcontext()

    def tell(now: Snapshot) -> None:
        nonlocal start, end, tracing
        done = now.passes
        now.lengths.copy_(torch.where((now.lengths < middle) | (now.lengths > last), middle, now.lengths))
        if done == warm:
            synchronize(session.device)
            start = time.perf_counter()
        elif done == warm + passes:
            synchronize(session.device)
            end = time.perf_counter()
            if traced is None:
                raise _Enough
            else:
                tracing = traced()
                tracing.__enter__()
        elif done == warm + 2 * passes:
            tracing.__exit__(None, None, None)
            raise _Enough

    with suppress(_Enough):
        decode(session, sampler, target, noise, tell, every, graph, waits=False)
    if not end:
        raise VisarError(f"The decoding ended before {passes} passes of it could be timed.")
    return Steady(1e3 * (end - start) / passes, passes, (graph.seconds or None) if graph is not None else None)
