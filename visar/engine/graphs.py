"""A sampler's whole step as one CUDA graph: model, guidance, law, verification and commit, replayed with one launch.

A pass of a small model is hundreds of kernels of a few microseconds, and a host that launches them one by one is slower
than the GPU. A captured step is launched at once. It reads and writes the very tensors that it was captured with, so
everything that an image depends on lies in tensors that are refilled: the session's buffers and the sampler's state.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], None]
Capture = Callable[[Step], Step]  # records a step without taking it, and gives what takes it from then on
WARM = 2  # steps before a capture: Triton compiles its kernels, cuBLAS makes its workspaces, drafters fall into step


def cuda_graph(step: Step) -> Step:
    """Capture a step of the current device."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class Graph:
    """The step of one sampler on one session, captured after a few that were taken one kernel at a time.

    `state` is what the captured step works on, None before there is one; `replays` counts, of the decoding at work.
    `seconds` are those that capturing took in it, and `uncounted` the bytes that replayed passes read, which the host
    does not see. Where capture fails, the host goes on launching, and says so.
    """

    def __init__(self, capture: Capture = cuda_graph):
        self.capture = capture
        self.state: Any = None
        self._replay: Step | None = None
        self._failed = False
        self._warm = WARM
        self._bytes = 0
        self.replays = self.uncounted = 0
        self.seconds = 0.0

    def begin(self, state: Any, drafts: bool) -> Any:
        """The state to decode with: the captured one, filled with a fresh one, or the fresh one itself.

        A drafter's first round is not like the others, so with one (`drafts`) it is never replayed.
        """
        self.replays, self.uncounted, self.seconds = 0, 0, 0.0
        if self._replay is not None:
            self._warm = 1 if drafts else 0
            refill(self.state, state)
        else:
            self._warm, self.state = WARM, state
        return self.state

    def step(self, step: Step, bytes_read: Callable[[], int] = int) -> None:
        """Take a step, by the host or by the graph; `bytes_read` is what the host has counted so far."""
        if self._warm or self._failed:
            self._warm = max(self._warm - 1, 0)
            step()
            return
        if self._replay is None:
            start, before = time.perf_counter(), bytes_read()
            try:
                self._replay = self.capture(step)
            except RuntimeError as error:
                self._failed = True
                reason = str(error).splitlines()[0]
                logging.getLogger("visar").warning("A step could not be captured, and is slower for it: %s", reason)
                step()
                return
            self.seconds += time.perf_counter() - start
            self._bytes = bytes_read() - before
            self.uncounted -= self._bytes  # the host counted a pass that it did not take
        self._replay()
        self.replays += 1
        self.uncounted += self._bytes

    def forget(self) -> None:
        """The shapes of passes have changed: capture again."""
        self._replay, self._warm = None, WARM


class Rows:
    """A function of the rows of tensors as graphs, one for each power of two of rows; what is missing is filled up.

    Rows must not know of one another. More of them than `most` go to the function itself.
    """

    def __init__(self, function: Callable[..., Tensor], capture: Capture = cuda_graph, most: int = 4096):
        self.function, self.capture, self.most = function, capture, most
        self._made: dict[int, tuple[list[Tensor], Tensor, Step]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        rows = len(inputs[0])
        if not 0 < rows <= self.most:
            return self.function(*inputs)
        size = 1 << (rows - 1).bit_length()
        if size not in self._made:
            self._made[size] = self._captured(size, inputs)
        given, out, replay = self._made[size]
        for static, x in zip(given, inputs, strict=True):
            static[:rows].copy_(x)
        replay()
        return out[:rows].clone()

    def _captured(self, size: int, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], Tensor, Step]:
        given = [x.new_zeros(size, *x.shape[1:]) for x in inputs]
        for static, x in zip(given, inputs, strict=True):
            static[: len(x)].copy_(x)
        out = self.function(*given).clone()  # once by the host, before it is captured

        def step() -> None:
            out.copy_(self.function(*given))

        return given, out, self.capture(step)


class RowGraphs:
    """Such functions by what they compute; of more than `limit` the one that was not used for longest goes."""

    def __init__(self, capture: Capture = cuda_graph, limit: int = 16):
        self.capture, self.limit = capture, limit
        self._made: OrderedDict[Hashable, Rows] = OrderedDict()

    def of(self, key: Hashable, function: Callable[..., Tensor]) -> Rows:
        """The graphs of a function; equal keys mean functions that give the same."""
        made = self._made.pop(key, None) or Rows(function, self.capture)
        self._made[key] = made
        if len(self._made) > self.limit:
            self._made.popitem(last=False)
        return made


class Kept:
    """Sessions and their graphs, by what they were made for; the one that was not used for longest goes first."""

    def __init__(self, limit: int = 4):
        self.limit = limit
        self._kept: OrderedDict[Hashable, tuple[Any, Graph]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, key: Hashable) -> tuple[Any, Graph] | None:
        """What was kept, which is then the caller's alone until it is given back."""
        return self._kept.pop(key, None)

    def give(self, key: Hashable, session: Any, graph: Graph) -> None:
        self._kept[key] = (session, graph)
        while len(self._kept) > self.limit:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        self._kept.clear()


def refill(old: Any, new: Any) -> None:
    """Give all tensors within `old` the values of those in `new`, in place; what is no tensor must be equal."""
    if isinstance(old, Tensor):
        old.copy_(new)
    elif isinstance(old, (list, tuple)):
        for a, b in zip(old, new, strict=True):
            refill(a, b)
    elif hasattr(old, "__dict__") and type(old) is type(new):
        for name, value in vars(old).items():
            refill(value, getattr(new, name))
    elif old != new:
        raise ValueError(f"{old!r} was captured, not {new!r}.")
