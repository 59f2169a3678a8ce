"""A sampler's whole step as one CUDA graph: model, guidance, distribution, verification and commit in one launch.

A pass of a small model is hundreds of kernels of a few microseconds, and launching them one by one takes the host
longer than running them takes the GPU. A captured step reads and writes the tensors that it was captured with, so
everything that an image depends on is in tensors that are refilled: the session's buffers and the sampler's state.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Step = Callable[[], None]
Capture = Callable[[Step], Step]  # records a step without running it, and returns a function that runs it
WARM = 2  # steps before a capture: Triton compiles kernels, cuBLAS allocates workspaces


def cuda_graph(step: Step) -> Step:
    """Capture a step of the current device. Other threads, which make pixels, may allocate memory meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


class Graph:
    """The step of one sampler on one session, captured after `WARM` eager steps.

    `state` is the state of the captured step, None before the first decoding. Of the current decoding, `replays`
    counts replayed passes, `uncounted` the bytes that they read, and `seconds` is the time of the capture. If capture
    fails, steps stay eager, with a warning.
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

    def begin(self, state: Any) -> Any:
        """The state to decode with: the captured one, refilled from `state`, or `state` itself."""
        self.replays, self.uncounted, self.seconds = 0, 0, 0.0
        if self._replay is not None:
            refill(self.state, state)
        else:
            self._warm, self.state = WARM, state
        return self.state

    def step(self, step: Step, bytes_read: Callable[[], int] = int) -> None:
        """Run a step, eagerly or by the graph; `bytes_read` gives the bytes counted by the host so far."""
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
                logging.getLogger("visar").warning("A step could not be captured, so it is slower: %s", reason)
                step()
                return
            self.seconds += time.perf_counter() - start
            self._bytes = bytes_read() - before
            self.uncounted -= self._bytes  # the host counted a pass that did not run
        self._replay()
        self.replays += 1
        self.uncounted += self._bytes

    def forget(self) -> None:
        """The shapes of passes have changed: capture again."""
        self._replay, self._warm = None, WARM


class Rows:
    """A function of the rows of tensors as graphs, one for each power of two of rows, padded to that.

    Rows must be independent. More rows than `most` go to the function itself.
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
        out = self.function(*given).clone()  # eager once, before the capture

        def step() -> None:
            out.copy_(self.function(*given))

        return given, out, self.capture(step)


class RowGraphs:
    """`Rows` by key; beyond `limit` the least recently used is dropped."""

    def __init__(self, capture: Capture = cuda_graph, limit: int = 16):
        self.capture, self.limit = capture, limit
        self._made: OrderedDict[Hashable, Rows] = OrderedDict()

    def of(self, key: Hashable, function: Callable[..., Tensor]) -> Rows:
        """The graphs of a function; equal keys must mean equal functions."""
        made = self._made.pop(key, None) or Rows(function, self.capture)
        self._made[key] = made
        if len(self._made) > self.limit:
            self._made.popitem(last=False)
        return made


class SessionCache:
    """Sessions with their graphs, by key; beyond `limit` the least recently used is dropped."""

    def __init__(self, limit: int = 4):
        self.limit = limit
        self._entries: OrderedDict[Hashable, tuple[Any, Graph]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, key: Hashable) -> tuple[Any, Graph] | None:
        """Remove and return an entry, None if there is none; `give` puts it back."""
        return self._entries.pop(key, None)

    def give(self, key: Hashable, session: Any, graph: Graph) -> None:
        self._entries[key] = (session, graph)
        while len(self._entries) > self.limit:
            self._entries.popitem(last=False)

    def clear(self) -> None:
        self._entries.clear()


class _Same:
    """An object that is equal to itself alone; it is held, so its id stays its own."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


OF_EVERY_MODULE = vars(nn.Module()).keys() - {"training"}


def marks_of(*parts: nn.Module) -> Hashable:
    """What a captured step has of modules for good: where weights are, which modules and hooks ran, their settings.

    What is written into weights since is read. Settings are attributes, such as the adapter that is active and its
    scale, by value or, of other objects, by identity.
    """
    tensors = (t for part in parts for t in (*part.parameters(), *part.buffers()))
    modules = (m for part in parts for m in part.modules())
    return (
        tuple((t.data_ptr(), t.dtype, t.stride()) for t in tensors),
        # The number of a hook is given once in a process.
        tuple((_Same(type(m)), *m._forward_hooks, *m._forward_pre_hooks, *_settings(m)) for m in modules),
    )


def _settings(module: nn.Module) -> Iterator[Hashable]:
    for name, value in vars(module).items():
        if name not in OF_EVERY_MODULE:
            yield name
            yield _mark(value)


def _mark(value: Any) -> Hashable:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return tuple((_mark(name), _mark(own)) for name, own in value.items())
    return tuple(map(_mark, value)) if isinstance(value, (list, tuple, set)) else _Same(value)


def refill(old: Any, new: Any) -> None:
    """Copy all tensors in `new` into those of `old`. Raises `ValueError` unless everything else is equal."""
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
