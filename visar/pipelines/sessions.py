"""The session of a call: made for it, or on a GPU kept from a call of the same shape together with its CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visar.drafters import DraftModel
from visar.drafters.loading import attach, aux_layers_of
from visar.engine.graphs import Capture, Graph, Kept, cuda_graph
from visar.engine.guidance import Guidance
from visar.engine.memory import check_memory, decoding_bytes
from visar.errors import VisarError
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.session import ModelSession
from visar.samplers import Sampler, Target


class Call(NamedTuple):
    """What a session is made for: a condition [B, ...] and its mask, a sampler, and what the sampler aims at."""

    gpt: LlamaGen
    drafter: DraftModel | None
    condition: Tensor
    mask: Tensor | None
    method: Sampler
    target: Target
    guidance: Guidance
    grid: int
    codebook: Tensor

    def key(self) -> Hashable:
        """Equal for calls that one captured step can serve."""
        parts = [self.gpt] + ([] if self.drafter is None else [self.drafter])
        weights = tuple(p.data_ptr() for part in parts for p in part.parameters())
        given = self.target.forced is not None, self.target.allowed is not None
        shapes = (self.condition.shape, self.condition.dtype, self.mask is not None)
        return (
            weights,
            shapes,
            self.method,
            replace(self.target, forced=None, allowed=None),
            given,
            self.guidance,
            self.grid,
        )

    def session(self) -> ModelSession:
        """A new session, with the drafter that the sampler needs; a `VisarError` where memory does not do."""
        c = self
        halves, length = 2 if c.guidance.active else 1, c.grid**2
        each = decoding_bytes(c.gpt, halves, length, c.method.window)
        check_memory(each, len(c.condition), c.gpt.device)
        made = ModelSession(
            c.gpt, c.condition, c.mask, length=length, window=c.method.window, grid=c.grid, guidance=c.guidance,
            aux_layers=aux_layers_of(c.drafter),
        )  # fmt: skip
        made.codebook = c.codebook
        if c.drafter is not None:
            depth: int = c.method.depth  # type: ignore[attr-defined]
            made.drafter = attach(made, c.drafter, depth, c.method.window, c.condition, c.mask, c.grid)
        return made


class Sessions:
    """Of one pipeline. `capture` makes a step a graph; by default CUDA does, and elsewhere nothing is captured."""

    def __init__(self, capture: Capture | None = None, limit: int = 4):
        self.capture, self.kept = capture, Kept(limit)

    def run(self, call: Call, decode: Callable[[ModelSession, Graph | None], Any]) -> tuple[ModelSession, Any]:
        """The session of a call, and what `decode` makes of it."""
        capture = self.capture or (cuda_graph if call.gpt.device.type == "cuda" else None)
        # A session that has left its unconditional half cannot have it back.
        if capture is None or not getattr(call.method, "capturable", True) or call.guidance.interval >= 0:
            session = self._made(call)
            graph = Graph(capture) if capture is not None and getattr(call.method, "capturable", True) else None
            return session, decode(session, graph)
        key = call.key()
        if (kept := self.kept.take(key)) is None:
            session, graph = self._made(call), Graph(capture)
        else:
            session, graph = kept
            session.start(call.condition, call.mask)
            if session.drafter is not None:
                session.drafter.start(call.condition, call.mask)
        result = decode(session, graph)
        self.kept.give(key, session, graph)  # not where decoding failed: what it left behind is not known
        return session, result

    def _made(self, call: Call) -> ModelSession:
        try:
            return call.session()
        except (VisarError, torch.OutOfMemoryError):
            if not len(self.kept):
                raise
        self.kept.clear()
        if call.gpt.device.type == "cuda":
            torch.cuda.empty_cache()
        return call.session()
