"""Slots: rows of one running decoding that requests take and leave, so that none waits for the slowest.

A row depends on nothing but its own request: noise is keyed by the row's own passes, and its settings are tensors that
the kernels read. On a GPU, and where steps are captured, all rows are in every pass and all buffers stay where they
are. On a CPU, where each row takes time, a pass has the rows of requests only: rows move together, with all that is
theirs.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visar.engine.graphs import Capture, Graph
from visar.engine.guidance import Guidance, RowGuidance
from visar.engine.rng import Noise
from visar.engine.session import Session


class Row(NamedTuple):
    """What a row has decoded: `tokens` [N] and `commit_pass` [N], by its own passes; copies."""

    tokens: Tensor
    commit_pass: Tensor


class Slots:
    """As many slots as `session` has rows, all free at first; `targets` holds a target of each row's own.

    `every`: passes between two looks at the device, which notice what is done. With `capture`, steps are captured.
    `rows` are the slots of the session's rows, None for one that is free.
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
        self.session, self.sampler, self.size = session, sampler, session.batch
        self.every = every or (1 if session.device.type == "cpu" else 4)
        self.state = sampler.begin(session, targets, noise)
        self.graph = None if capture is None else Graph(capture)
        if self.graph is not None:
            self.state = self.graph.begin(self.state)
        self.compact = self.graph is None and session.device.type == "cpu"
        self.rows: list[int | None] = [None] * self.size
        self.passes = 0
        self.seen = [session.length] * self.size  # tokens of each slot committed, when the host last looked
        self._own: list[str] = []  # what of the state is the rows' own
        session.lengths.fill_(session.length)

    @property
    def free(self) -> set[int]:
        """The slots that a request may have."""
        return set(range(self.size)).difference(slot for slot in self.rows if slot is not None)

    @torch.inference_mode()
    def admit(self, slot: int, fresh: Session, target: Any, guidance: Guidance, noise: Noise) -> None:
        """Give a free slot to a request: `fresh` is a session of one row that has just started.

        `target`, `guidance`, which counts where the session has it by row, and `noise` are of one row. Raises
        `ValueError` for a slot that is taken.
        """
        if slot not in self.free:
            raise ValueError(f"Slot {slot} is taken.")
        begun = self.sampler.begin(fresh, target, noise)
        if None not in self.rows:
            self._select([*range(len(self.rows)), 0])
            self.rows[-1] = None
        row = self.rows.index(None)
        self.session.place(row, fresh)
        if self.session.drafter is not None:
            self.session.drafter.place(row, fresh.drafter)
        if (guidances := self._guidances()) is not None:
            guidances.place(row, guidance)
        if self.state.target.place(row, target) and self.graph is not None:
            self.graph.forget()  # its kernels read fewer settings than are needed now
        place(self.state.noise, row, noise)
        own = place(self.state, row, begun)
        self._own = self._own or own  # as of all rows: of one row alone nobody could tell
        self.rows[row] = slot

    @torch.inference_mode()
    def step(self) -> tuple[list[int], list[int]]:
        """Run `every` passes; the slots that have finished since, and those that failed. Both are still taken."""
        taken = [row for row, slot in enumerate(self.rows) if slot is not None]
        if self.compact and 0 < len(taken) < len(self.rows):
            self._select(taken)

        def step() -> None:
            self.sampler.step(self.session, self.state)

        for _ in range(self.every):
            if self.graph is None:
                step()
            else:
                self.graph.step(step)
        self.passes += self.every
        sound = self.session.finite_rows() & self.state.target.sound()
        seen, fine = torch.stack([self.session.lengths, sound.long()]).tolist()  # the host waits once
        done, failed = [], []
        for row, slot in enumerate(self.rows):
            if slot is None:
                continue
            self.seen[slot] = seen[row]
            if not fine[row]:
                failed.append(slot)
            elif seen[row] >= self.session.length:
                done.append(slot)
        return done, failed

    def read(self, slot: int) -> Row:
        """The tokens of a slot, of which those not committed yet are drafts."""
        row, n = self.rows.index(slot), self.session.length
        own = (found[row : row + 1, :n] for found in (self.state.tokens, self.state.commit_pass))
        return Row(*(self.session.in_raster(values, slice(row, row + 1))[0].clone() for values in own))

    @torch.inference_mode()
    def release(self, slot: int) -> None:
        """Free a slot, finished or not: it commits nothing more."""
        row = self.rows.index(slot)
        self.session.lengths[row] = self.session.length
        self.rows[row] = None

    def _select(self, rows: list[int]) -> None:
        """Row i becomes what the row `rows[i]` was, with all that is its own."""
        index = torch.tensor(rows, device=self.session.device)
        if self.session.drafter is not None:
            self.session.drafter.select(index)
        self.session.select(index)
        if (guidances := self._guidances()) is not None:
            guidances.select(index)
        self.state.target.select(index)
        # Its order of cells is the session's own tensor.
        self.state.target.on(self.session.device, self.session.length, self.session.vocab, self.session.cells)
        self.state.noise = self.state.noise.of(index)
        for name in self._own:
            setattr(self.state, name, getattr(self.state, name)[index])
        self.rows = [self.rows[row] for row in rows]

    def _guidances(self) -> RowGuidance | None:
        """The session's, if each row has its own; a drafter's session has the same."""
        own = getattr(self.session, "guidance", None)
        return own if isinstance(own, RowGuidance) else None


def place(old: Any, row: int, new: Any) -> list[str]:
    """Copy row 0 of the tensors in `new` into the `row` of those in `old`; what has no rows is equal in both.

    Returns the names of those that have rows, if there are several. Raises `ValueError` for tensors that are neither.
    """
    own = []
    names = [f.name for f in fields(old)] if hasattr(old, "__dataclass_fields__") else list(vars(old))
    for name in names:
        a, b = getattr(old, name), getattr(new, name)
        if not isinstance(a, Tensor):
            continue
        if b.shape == (1, *a.shape[1:]):
            a[row if len(a) > 1 else 0].copy_(b[0])  # a table for all rows is equal in both
            own += [name] if len(a) > 1 else []
        elif a.shape != b.shape:
            raise ValueError(f"{name} has no rows: {list(a.shape)}, and {list(b.shape)} for one row.")
    return own
