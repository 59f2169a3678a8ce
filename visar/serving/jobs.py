"""A job: a request of a client for one image, and what the engine tells about it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from visar.errors import VisarError
from visar.generation.model import ImageModel
from visar.generation.pool import Finished, Glance, Request


class Busy(VisarError):
    """Too many jobs are waiting."""


class Closed(VisarError):
    """The engine takes no jobs any more."""


class Late(VisarError):
    """The deadline of a job has passed."""


class Started(NamedTuple):
    """The job has got its row, after `waited` seconds."""

    waited: float


class Partial(NamedTuple):
    """The state of an image at work: `tokens` [N, ...] and `commit_pass` [N], -1 where a token is a draft."""

    tokens: Tensor
    commit_pass: Tensor
    at: Glance


class Failed(NamedTuple):
    """The job has ended without its image: a `VisarError` for the client, another error for the log."""

    error: BaseException


Event = Started | Partial | Finished | Failed


@dataclass(eq=False)
class Job:
    """A request for one image of `model`, made with `sampler`, and `tell`, which the engine's thread calls.

    `tell` gets `Started`, then a `Partial` after each pass for which `watch` is true, then `Finished` or `Failed`;
    after `cancel` nothing more. It must return quickly and raise nothing. `deadline` is a time of `time.monotonic`.
    """

    model: ImageModel
    sampler: Any
    request: Request
    tell: Callable[[Event], None]
    watch: Callable[[Glance], bool] | None = None
    deadline: float = math.inf
    began: float = field(default=0.0, init=False)  # when it was submitted
    _left: threading.Event = field(default_factory=threading.Event, init=False)

    def cancel(self) -> None:
        """End it: its row is free after the current pass."""
        self._left.set()

    @property
    def cancelled(self) -> bool:
        return self._left.is_set()
