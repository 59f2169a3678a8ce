"""The session of a call: a new one, or on a GPU a cached one of the same shape with its CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from visar.drafters.loading import kind_of
from visar.engine.graphs import Capture, Graph, SessionCache, cuda_graph, marks_of
from visar.engine.guidance import Guidance
from visar.engine.memory import check_memory
from visar.engine.session import Session
from visar.errors import VisarError
from visar.families.base import DiscreteFamily, Encoded
from visar.kernels.invariant import is_invariant
from visar.samplers import Sampler, Target


def marks(family: DiscreteFamily, drafter: Any) -> Hashable:
    """Those of the modules that a step runs; with others it needs a new session."""
    return marks_of(family.model, *([] if drafter is None else [drafter]))


class Call(NamedTuple):
    """The parameters of a session: encoded conditions, a sampler, and its target."""

    family: DiscreteFamily
    drafter: Any  # of one of `visar.drafters.DRAFTERS`, or None
    encoded: Encoded
    method: Sampler
    target: Target
    guidance: Guidance

    def key(self) -> Hashable:
        """Equal for calls that can share a captured step."""
        given = self.target.forced is not None, self.target.allowed is not None
        shapes = tuple((e.shape, e.dtype) for e in self.encoded)
        target = replace(self.target, forced=None, allowed=None)
        settings = self.method, target, given, self.guidance, self.family.layout, is_invariant()
        return marks(self.family, self.drafter), shapes, settings

    @property
    def window(self) -> int:
        """The most inputs of a pass: a sampler of one feeds a forced token together with the one before."""
        forced = self.target.forced is not None or self.family.forced is not None
        return max(self.method.window, 2 if forced else 1)

    def session(self) -> Session:
        """A new session with the sampler's drafter. Raises `VisarError` if memory is too small."""
        c, rows = self, len(self.encoded[0])
        if is_invariant() and hasattr(c.method, "children") and c.family.device.type == "cuda":
            raise VisarError("The invariant mode has no trees of drafts on a GPU; use a sampler that drafts sequences.")
        check_memory(c.family.bytes_per_image(c.window, c.guidance.active), rows, c.family.device)
        target = c.family.drafting
        kind = None if c.drafter is None else kind_of(c.drafter, target)
        made = c.family.session(
            c.encoded,
            window=c.window,
            guidance=c.guidance,
            aux_layers=None if kind is None else kind.aux_layers(c.drafter),
        )
        made.codebook, made.layout = c.family.codebook, c.family.layout
        if kind is not None:
            depth: int = c.method.depth  # type: ignore[attr-defined]
            session: Any = made
            made.drafter = kind.attach(session, c.drafter, target, depth, c.method.window, c.encoded)
        return made


class Sessions:
    """The sessions of one model. `capture` makes a step a graph; by default steps are captured on CUDA only."""

    def __init__(self, capture: Capture | None = None, limit: int = 4):
        self.capture, self.cache = capture, SessionCache(limit)

    def run(self, call: Call, decode: Callable[[Session, Graph | None], Any]) -> tuple[Session, Any]:
        """The session of a call, and the result of `decode`."""
        capture = self.capture or (cuda_graph if call.family.device.type == "cuda" else None)
        # A session cannot restore its unconditional batch.
        if capture is None or not getattr(call.method, "capturable", True) or call.guidance.interval >= 0:
            session = self._made(call)
            graph = Graph(capture) if capture is not None and getattr(call.method, "capturable", True) else None
            return session, decode(session, graph)
        key = call.key()
        if (found := self.cache.take(key)) is None:
            session, graph = self._made(call), Graph(capture)
        else:
            session, graph = found
            session.codebook = call.family.codebook
            session.start(*call.encoded)
            if session.drafter is not None:
                session.drafter.start(*call.encoded)
        result = decode(session, graph)
        self.cache.give(key, session, graph)  # only after success: a failure leaves unknown buffers
        return session, result

    def _made(self, call: Call) -> Session:
        try:
            return call.session()
        except (VisarError, torch.OutOfMemoryError):
            if not len(self.cache):
                raise
        self.cache.clear()
        if call.family.device.type == "cuda":
            torch.cuda.empty_cache()
        return call.session()
