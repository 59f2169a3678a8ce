"""A stand-in for CUDA graphs on a CPU: the operations of a step are recorded on the very tensors, and done again.

As in a CUDA graph nothing of the Python that made them runs in a replay: what is bound anew instead of written in
place, counted by the host or decided by looking at a tensor goes wrong, or cannot be recorded at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from visar.engine.cached_session import CachedSession
from visar.kernels import philox, target_probs
from visar.kernels.attention import AttentionMetadata
from visar.samplers import autoregressive


def all_tensors(root: Any) -> list[Tensor]:
    """The tensors of an object, of those that it holds, and so on; those of modules are left out."""
    seen: dict[int, Any] = {}
    found: list[Tensor] = []

    def walk(x: Any) -> None:
        if id(x) in seen or isinstance(x, (torch.nn.Module, type)):
            return
        seen[id(x)] = x
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, dict):
            for value in x.values():
                walk(value)
        elif isinstance(x, (list, tuple)):
            for value in x:
                walk(value)
        elif hasattr(x, "__dict__"):
            walk(vars(x))

    walk(root)
    return found


class Recorder:
    """`Graph(Recorder(session))` on a CPU; `captures` counts."""

    def __init__(self, monkeypatch: Any):
        # What a CPU may ask of its tensors, a GPU is not asked.
        monkeypatch.setattr(CachedSession, "visible", lambda s, count: len(s._slot))
        monkeypatch.setattr(AttentionMetadata, "_all_visible", lambda s, queries, visible: False)
        monkeypatch.setattr(target_probs, "descending", lambda p: p.sort(dim=-1, descending=True).values)
        monkeypatch.setattr(autoregressive, "forced_next", lambda session, state: state.width > 1)
        monkeypatch.setattr(philox, "philox_numpy", philox.philox_torch)
        monkeypatch.setenv("VISAR_LINEAR", "plain")  # a GPU has no other form
        self.captures = 0

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        held = all_tensors([step.__closure__ and [c.cell_contents for c in step.__closure__]])
        before = [t.clone() for t in held]
        try:
            graph = make_fx(lambda: step())()  # takes the step while it is recorded
        finally:
            for tensor, old in zip(held, before, strict=True):
                tensor.copy_(old)
        return lambda: graph()
