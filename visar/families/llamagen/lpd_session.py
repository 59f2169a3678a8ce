"""The session of an LPD, whose queries are seen by nothing but themselves."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from visar.families.llamagen.lpd import LPD
from visar.families.llamagen.randar_session import AnyOrderSession


class LPDSession(AnyOrderSession):
    model: LPD  # type: ignore[assignment]
    asked_again: ClassVar[bool] = False

    def placed(self, x: Tensor, slots: Tensor) -> Tensor:
        return self.model.placed(x, self.positions_of(slots))

    def queries(self, slots: Tensor) -> Tensor:
        return self.model.queries(self.positions_of(slots))

    def mask(self, slots: Tensor, first: int, visible: int) -> Tensor:
        """Tokens, which are at even slots, are seen from their own slot on; a query by itself."""
        slot = self._slot[:visible]
        return (slot <= slots[..., None]) & (slot % 2 == 0) | (slot == slots[..., None])

    def group_mask(self, slots: Tensor, root: Tensor, count: Tensor, visible: int) -> Tensor:
        """All tokens are seen, those of one group by each other, and queries by those of their group."""
        slot, root, asked = self._slot[:visible], root[..., None], slots[..., None] > root[..., None]
        ahead = (slot - root - 1) % 2 == 0
        own = (slot > root) & ahead & (slot < root + 2 * count[..., None]) & asked
        return (slot <= root) & ~ahead | own

    def group_positions(self, window: int) -> Tensor:
        return self.positions(window)
