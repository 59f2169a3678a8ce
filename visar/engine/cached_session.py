"""The base of sessions with a static KV cache: both guidance batches in one pass, rows at their own pace."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from visar.engine.finite import require_finite
from visar.engine.guidance import Guidance
from visar.engine.kv_cache import KVCache
from visar.engine.session import Session


class CachedSession(Session):
    """Decode `length` tokens in rows of a `cache` of `slots`, which a subclass makes.

    `batches` is 2 with guidance, else 1: the model runs on `batches` * B rows, the conditional batch first, with the
    same drafts in both. The first `folded` slots are not in the cache. `row_tensors` names the subclass's tensors of
    one entry for each row, other than the cache.
    """

    row_tensors: ClassVar[tuple[str, ...]] = ()
    cache: KVCache

    def __init__(
        self,
        batch: int,
        length: int,
        vocab: int,
        device: torch.device,
        *,
        slots: int,
        dtype: torch.dtype,
        guidance: Guidance = Guidance(),
        folded: int = 0,
    ):
        super().__init__(batch, length, vocab, device)
        self.guidance, self.dtype, self.folded = guidance, dtype, folded
        self.batches = 2 if guidance.active else 1
        self.watched = guidance.active and guidance.ends
        self.bytes_read = 0
        self._slot = torch.arange(slots, device=self.device)
        self._slots_read = torch.zeros((), dtype=torch.long, device=self.device)
        self._logits: Tensor

    @abstractmethod
    def root_slots(self) -> Tensor:
        """The cache slots, [B] or [rows], of the last committed tokens, the first inputs of the next pass."""

    def visible(self, count: int) -> int:
        """The number of slots up to the last of `count` inputs; on a GPU all slots, as reading `lengths` would wait."""
        if self.device.type != "cpu":
            return len(self._slot)
        return int(self.root_slots().max()) + count

    def counted(self, slots: Tensor, visible: int, by_host: bool) -> None:
        """Count the bytes of cache that a pass over inputs at `slots` [rows, W] reads.

        On a GPU the kernel reads each row up to its last input, and the host does not know how far that is; a pass with
        a mask reads the first `visible` slots (`by_host`).
        """
        if self.device.type == "cpu" or by_host:
            self.bytes_read += len(slots) * (visible - self.folded) * self.cache.bytes_per_slot
        else:
            self._slots_read += (slots[:, -1] + 1 - self.folded).sum()

    def guided(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Guided logits [B, W, V] for logits [rows, W, V] of the positions [B, W]."""
        if self.batches == 1:
            return logits
        cond, uncond = logits.chunk(2)
        return self.guidance.combine(cond, uncond, positions)

    def drop_unconditional(self) -> None:
        """Drop the unconditional batch once guidance is over in all rows."""
        if self.batches == 1:
            return
        self.batches, self.watched = 1, False
        self._keep(torch.arange(self.batch, device=self.device))
        if self.drafter is not None:
            self.drafter.drop_unconditional()

    def rows_of(self, images: int | Tensor) -> Tensor:
        """The rows of an image, or of several [R], in the batches of guidance."""
        return (torch.arange(self.batches, device=self.device)[:, None] * self.batch + images).flatten()

    def place(self, row: int, fresh: Session) -> None:
        assert isinstance(fresh, CachedSession)
        rows = self.rows_of(row)
        self.lengths[row] = 0
        self.cache.place(rows, fresh.cache)
        for name in self.row_tensors:
            if (own := getattr(self, name)) is not None:
                own[rows] = getattr(fresh, name)

    def select(self, rows: Tensor) -> None:
        every = self.rows_of(rows)
        self.batch, self.lengths = len(rows), self.lengths[rows]
        self._keep(every)

    def _keep(self, rows: Tensor) -> None:
        """Only these of the rows in the batches of guidance, in this order."""
        self.cache.select(rows)
        for name in self.row_tensors:
            if (own := getattr(self, name)) is not None:
                setattr(self, name, own[rows])

    def finite_rows(self) -> Tensor:
        return self._logits.isfinite().flatten(1).all(1).view(self.batches, -1).all(0)

    def reached(self, least: int) -> bool:
        if self.batches == 1 or not self.guidance.over(least):
            return False
        self.drop_unconditional()
        return True

    def check(self) -> None:
        self.bytes_read += int(self._slots_read) * self.cache.bytes_per_slot
        self._slots_read.zero_()
        require_finite(self._logits, "The model's logits", self.dtype)
        # Attention gives no weight to a key of -inf, which then shows nowhere else.
        for cached in (self.cache.keys, self.cache.values):
            require_finite(cached, "The model's keys and values", self.dtype)
