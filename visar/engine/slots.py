"""Slots: rows of one running decoding that requests take and leave, so that none waits for the slowest.

A row depends on nothing but its own request: noise is keyed by the row's own passes, and its settings are tensors that
the kernels read. All buffers stay where they are, so a captured graph stays valid.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visar.engine.graphs import Capture, Graph
from visar.engine.rng import Noise
from visar.engine.session import Session


class Row(NamedTuple):
    """What a row has decoded: `tokens` [N] and `commit_pass` [N], by its own passes; copies."""

    tokens: Tensor
    commit_pass: Tensor


class Slots:
    """The rows of `session` as slots, all free at first; `targets` holds a target of each row's own.

    `every`: passes between two looks at the device, which notice what is done. With `capture`, steps are captured.
    """

    def __init__(
        self,
        session: Session,
        sampler: Any,
        targets: Any,
        noise: Noise,
        *,
        capture: Capture | None = None,
        every: int | None = None,
    ):
        self.session, self.sampler = session, sampler
        self.every = every or (1 if session.device.type == "cpu" else 4)
        self.state = sampler.begin(session, targets, noise)
        self.graph = None if capture is None else Graph(capture)
        if self.graph is not None:
            self.state = self.graph.begin(self.state)
        self.free = set(range(session.batch))
        self.passes = self.row_passes = 0  # of the pool, and of rows that were taken
        self.seen: list[int] = [session.length] * session.batch  # tokens committed, when the host last looked
        session.lengths.fill_(session.length)

    @torch.inference_mode()
    def admit(self, row: int, fresh: Session, target: Any, noise: Noise) -> None:
        """Give the free slot `row` to a request: `fresh` is a session of one row that has just started.

        `target` and `noise` are of one row. Raises `ValueError` for a slot that is taken.
        """
        if row not in self.free:
            raise ValueError(f"Slot {row} is taken.")
        begun = self.sampler.begin(fresh, target, noise)
        self.session.place(row, fresh)
        if self.session.drafter is not None:
            self.session.drafter.place(row, fresh.drafter)
        if self.state.target.place(row, target) and self.graph is not None:
            self.graph.forget()  # its kernels read fewer settings than are needed now
        place(self.state.noise, row, noise)
        place(self.state, row, begun)
        self.free.discard(row)

    @torch.inference_mode()
    def step(self) -> tuple[list[int], list[int]]:
        """Run `every` passes; the slots that have finished since, and those that failed. Both are still taken."""

        def step() -> None:
            self.sampler.step(self.session, self.state)

        for _ in range(self.every):
            if self.graph is None:
                step()
            else:
                self.graph.step(step)
        self.passes += self.every
        taken = [row for row in range(self.session.batch) if row not in self.free]
        self.row_passes += self.every * len(taken)
        sound = self.session.finite_rows() & self.state.target.sound()
        seen = torch.stack([self.session.lengths, sound.long()]).tolist()  # the host waits once
        self.seen = seen[0]
        failed = [row for row in taken if not seen[1][row]]
        return [r for r in taken if self.seen[r] >= self.session.length and r not in failed], failed

    def read(self, row: int) -> Row:
        """The tokens of a slot, of which those not committed yet are drafts."""
        n, rows = self.session.length, slice(row, row + 1)
        own = (found[rows, :n] for found in (self.state.tokens, self.state.commit_pass))
        return Row(*(self.session.in_raster(values, rows)[0].clone() for values in own))

    @torch.inference_mode()
    def release(self, row: int) -> None:
        """Free a slot, finished or not: it commits nothing more."""
        self.session.lengths[row] = self.session.length
        self.free.add(row)


def place(old: Any, row: int, new: Any) -> None:
    """Copy row 0 of the tensors in `new` into the `row` of those in `old`; what has no rows is equal in both.

    Raises `ValueError` for tensors that are neither.
    """
    names = [f.name for f in fields(old)] if hasattr(old, "__dataclass_fields__") else list(vars(old))
    for name in names:
        a, b = getattr(old, name), getattr(new, name)
        if not isinstance(a, Tensor):
            continue
        if b.shape == (1, *a.shape[1:]):
            a[row if len(a) > 1 else 0].copy_(b[0])  # a table for all rows is equal in both
        elif a.shape != b.shape:
            raise ValueError(f"{name} has no rows: {list(a.shape)}, and {list(b.shape)} for one row.")
