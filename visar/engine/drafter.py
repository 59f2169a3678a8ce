"""Drafters propose tokens after the committed prefix of a Session, faster than its passes."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from visar.engine.session import Session
from visar.engine.tree import Tree

T = TypeVar("T")


class Drafter(ABC):
    """A round of drafting is `root`, then `extend` for each level of nodes with children, then `keep` for trees."""

    bytes_read: int = 0  # of weights and cache, by count
    seconds: float = 0.0  # of drafting, measured by `Timed`
    passes: int = 0  # of drafting, counted by `Timed`
    head: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # that predicts a `chance` of hidden states

    @abstractmethod
    def root(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Begin a round: guided logits [B, 1, V] of the position after the first `lengths` [B] of `tokens` [B, N]."""

    @abstractmethod
    def extend(self, tokens: Tensor, tree: Tree | None, first: int) -> Tensor:
        """Guided logits [B, M, V] after the nodes `first`.. of a tree, or of a sequence, for their `tokens` [B, M]."""

    def last_hidden(self) -> Tensor | None:
        """What gave the last logits, [B, M, dim], of the conditional batch; None where it is not known."""
        return None

    def chance(self, drafts: Tensor, q: Tensor) -> Tensor | None:
        """The chance [B, M] that the target accepts `drafts` [B, M], sampled from the distributions q [B, M, V] of the
        last logits, as the drafter's head predicts it; None where it has no head."""
        if self.head is None or (hidden := self.last_hidden()) is None:
            return None
        return self.head(hidden, drafts, q)

    def check(self) -> None:  # noqa: B027 (as in a Session)
        """Raise `VisarError` if the last logits are not finite; called once, when all rows are done."""

    def start(self, *condition: Tensor) -> None:
        """The session has started new images of this condition. Allocates nothing."""
        self.bytes_read, self.seconds, self.passes = 0, 0.0, 0

    def place(self, row: int, fresh: Any) -> None:  # noqa: B027 (as above)
        """The session has a new image in `row`; `fresh` is the drafter of the session that it was started in."""

    def select(self, rows: Tensor) -> None:  # noqa: B027 (as above)
        """The session is about to `select` rows."""

    def drop_unconditional(self) -> None:  # noqa: B027 (not all have rows to drop)
        """The session has dropped the unconditional rows of its batch."""

    def keep(self, path: Tensor) -> None:  # noqa: B027 (not all have a cache)
        """The round ends with the nodes `path` [B, D] accepted, -1 after the end."""


class Timed(Drafter):
    """A drafter with a clock: on a GPU by events, which are read in `check`."""

    def __init__(self, inner: Drafter, device: torch.device):
        self.inner, self.device = inner, device
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def root(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        self.passes += 1
        return self._timed(lambda: self.inner.root(tokens, lengths))

    def extend(self, tokens: Tensor, tree: Tree | None, first: int) -> Tensor:
        self.passes += 1
        return self._timed(lambda: self.inner.extend(tokens, tree, first))

    def chance(self, drafts: Tensor, q: Tensor) -> Tensor | None:
        return self._timed(lambda: self.inner.chance(drafts, q))

    def keep(self, path: Tensor) -> None:
        self._timed(lambda: self.inner.keep(path))

    def start(self, *condition: Tensor) -> None:
        super().start(*condition)
        self.inner.start(*condition)

    def place(self, row: int, fresh: Any) -> None:
        self.inner.place(row, fresh.inner)

    def select(self, rows: Tensor) -> None:
        self.inner.select(rows)

    def drop_unconditional(self) -> None:
        self.inner.drop_unconditional()

    def check(self) -> None:
        self.inner.check()
        self.bytes_read = self.inner.bytes_read
        self.seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1000
        self._events.clear()

    def _timed(self, call: Callable[[], T]) -> T:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            result = call()  # a graph cannot be timed inside
        elif self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(self.device)
            start.record(stream)
            result = call()
            end.record(stream)
            self._events.append((start, end))
        else:
            begun = time.perf_counter()
            result = call()
            self.seconds += time.perf_counter() - begun
        self.bytes_read = self.inner.bytes_read
        return result


class SessionDrafter(Drafter):
    """Any Session of the same vocabulary as a drafter: a smaller model with its own cache.

    A round feeds the last two committed tokens, because the last accepted draft may not have been an input yet. A row
    that has committed none is fed the condition first, and its second input means nothing.
    """

    def __init__(self, session: Session, weights: int = 0):
        """`weights`: bytes of the model that a pass reads."""
        self.session = session
        self.weights = weights
        self._trees: dict[int, tuple[Tree, Tree]] = {}
        self._column: Tensor | None = None  # of the last pass, where the drafts follow one of its inputs only

    def root(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        inner = self.session
        inner.lengths.copy_((lengths - 1).clamp_min(0))
        logits = self._forward(tokens.gather(1, (inner.positions(2) - 1).clamp_min(0)), None, 0)
        self._column = (lengths - inner.lengths)[:, None, None]  # the root's
        # One before the root in all rows: drafts of a new row lie where its meaningless input was.
        inner.lengths.copy_(lengths - 1)
        return logits.gather(1, self._column.expand(-1, 1, logits.shape[-1]))

    def last_hidden(self) -> Tensor | None:
        if (found := self.session.hidden) is None:
            return None
        found = found[: self.session.batch]
        return found if self._column is None else found.gather(1, self._column.expand(-1, 1, found.shape[-1]))

    def extend(self, tokens: Tensor, tree: Tree | None, first: int) -> Tensor:
        self._column = None
        return self._forward(tokens, self._inner(tree), first + 1)

    def _forward(self, tokens: Tensor, tree: Tree | None, first: int) -> Tensor:
        self.bytes_read += self.weights
        return self._counted(lambda: self.session.forward(tokens, tree, first))

    def check(self) -> None:
        self._counted(self.session.check)

    def _counted(self, call: Callable[[], T]) -> T:
        before = getattr(self.session, "bytes_read", 0)
        result = call()
        self.bytes_read += getattr(self.session, "bytes_read", 0) - before
        return result

    def start(self, *condition: Tensor) -> None:
        super().start(*condition)
        self.session.start(*condition)

    def place(self, row: int, fresh: Any) -> None:
        self.session.place(row, fresh.session)

    def select(self, rows: Tensor) -> None:
        self.session.select(rows)

    def drop_unconditional(self) -> None:
        self.session.drop_unconditional()

    def keep(self, path: Tensor) -> None:
        root = torch.ones_like(path[:, :1])
        self.session.keep(torch.cat([root, torch.where(path > 0, path + 1, path)], dim=1))

    def _inner(self, tree: Tree | None) -> Tree | None:
        if tree is None:
            return None
        known, inner = self._trees.get(id(tree), (None, None))
        if known is not tree:
            inner = tree.after(1)
            self._trees = {id(tree): (tree, inner)}  # holds the tree, so that its id is not reused
        return inner
