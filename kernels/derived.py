"""What is computed from weights and kept: layouts for a processor, colours of a preview.

It has to be made again when the weights are others, and torch does not tell: `.data`, NumPy and shared memory write
without a trace. So the bytes themselves are compared, by a hash that reads them at the speed of memory, once in each
call (`steady_weights`).
"""

from __future__ import annotations

import functools
import secrets
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
WORDS = 2**17  # hashed at once: with their multipliers they stay in the second cache of a processor
PRIME = 2**127 - 1
_lock = threading.Lock()


class Steady:
    """A time in which no weight changes: what was compared in it, and the plans of `visar.kernels.linear`."""

    def __init__(self) -> None:
        self.checked: set[_Kept[Any]] = set()
        self.plans: dict[Any, Any] = {}


_steady: ContextVar[Steady | None] = ContextVar("visar_steady", default=None)
steady = _steady.get


@contextmanager
def steady_weights(of: Steady | None = None) -> Iterator[Steady]:
    """Within it weights do not change: what is kept of them is compared with them once, at first use.

    Decoding runs in it; one that is done in parts gives the time `of` which this is a part. One within another is the
    outer one.
    """
    if (outer := _steady.get()) is not None:
        yield outer
        return
    token = _steady.set(made := of or Steady())
    try:
        yield made
    finally:
        _steady.reset(token)


@functools.cache
def _keys() -> tuple[int, Tensor, Tensor]:
    """A random key, random multipliers, and room for a block: new in each process, so that nobody can aim at them."""
    multipliers = torch.empty(WORDS, dtype=torch.long)
    multipliers.random_(-(2**63), 2**63 - 1, generator=torch.Generator().manual_seed(secrets.randbits(63)))
    return secrets.randbelow(PRIME), multipliers, torch.empty_like(multipliers)


def fingerprint(weight: Tensor) -> int:
    """A hash of the bytes of a tensor, to be compared within this process.

    Two tensors of one size that differ, in whatever way, have the same one with a chance of less than 2**-32: a block's
    is the sum of its 32-bit words times random numbers, modulo 2**64 (multilinear hashing, Carter & Wegman 1979), and
    theirs are the coefficients of a polynomial at a random point.
    """
    data = weight.detach().contiguous().flatten().view(torch.uint8)
    if rest := data.numel() % 4:
        data = torch.cat([data, data.new_zeros(4 - rest)])
    total = 0
    with _lock, torch.inference_mode(False), torch.no_grad():
        key, multipliers, room = _keys()
        for words in data.view(torch.int32).split(WORDS):
            wide = room[: len(words)].copy_(words)
            total = (total * key + int(torch.dot(wide, multipliers[: len(words)]))) % PRIME
    return total


def _mark(weight: Tensor) -> tuple[Any, ...]:
    return weight.shape, weight.dtype, weight.device, fingerprint(weight)


@dataclass(eq=False)
class _Kept(Generic[T]):
    of: list[weakref.ref[Tensor]]
    marks: list[tuple[Any, ...]]
    value: T


class Derived(Generic[T]):
    """Values that were computed from tensors, kept as long as those live and hold the same bytes."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, ...], _Kept[T]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, weights: Sequence[Tensor]) -> bool:
        """Whether something is kept of `weights`, perhaps of what they were before."""
        return tuple(map(id, weights)) in self._kept

    def of(self, weights: Sequence[Tensor], make: Callable[[], T]) -> T:
        """The value of `weights`, which `make` computes."""
        key, now = tuple(map(id, weights)), steady()
        kept = self._kept.get(key)
        if kept is not None and now is not None and kept in now.checked:
            return kept.value
        marks = [_mark(w) for w in weights]
        if kept is None or kept.marks != marks:
            gone = [weakref.ref(w, lambda _: self._kept.pop(key, None)) for w in weights]
            kept = self._kept[key] = _Kept(gone, marks, make())
        if now is not None:
            now.checked.add(kept)
        return kept.value
