"""The processes of a run, started by torchrun, and their synchronization."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from visar.errors import VisarError
from visar.host import join, torchrun

PATIENCE = timedelta(hours=24)  # of a finished rank for the slowest
T = TypeVar("T")


class ToldElsewhere(VisarError):
    """An error that rank 0 reports for all."""


@dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `world`; `group` of `torch.distributed` has all, None is the default group."""

    rank: int = 0
    world: int = 1
    group: Any = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise VisarError(f"Rank must be 0 to {self.world - 1}, not {self.rank}.")
        if self.world > 1 and not dist.is_initialized():
            raise VisarError("Several ranks need torch.distributed; start them with torchrun and use join_ranks.")

    def agree(self, step: Callable[[], T]) -> T:
        """Run `step` on every rank, wait for all, and return this rank's result.

        If any rank's `step` raises `VisarError`, all raise: rank 0 the first of these errors, the others
        `ToldElsewhere`.
        """
        if self.world == 1:
            return step()
        result, message = None, None
        try:
            result = step()
        except VisarError as error:
            message = str(error)
        messages: list[str | None] = [None] * self.world
        dist.all_gather_object(messages, message, group=self.group)
        first = next((m for m in messages if m is not None), None)
        if first is not None:
            raise (ToldElsewhere if self.rank else VisarError)(first)
        return result  # type: ignore[return-value]

    def first(self, step: Callable[[], T]) -> T:
        """Run `step` on rank 0 only, and return its result on all; errors as in `agree`."""
        result = self.agree(lambda: step() if self.rank == 0 else None)
        if self.world > 1:
            box = [result]
            dist.broadcast_object_list(box, group=self.group, group_src=0)
            result = box[0]
        return result  # type: ignore[return-value]


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """The ranks of a torchrun job, over gloo on the host; a single rank for other processes."""
    if dist.is_initialized():
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Ranks(dist.get_rank(), dist.get_world_size(), group)
    elif torchrun():
        join("gloo", timeout=PATIENCE)
        try:
            yield Ranks(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()
    else:
        yield Ranks()
