"""The session of an LPD, whose queries are seen by nothing but themselves."""

from __future__ import annotations

from torch import Tensor

from visar.families.llamagen.lpd import LPD
from visar.families.llamagen.randar_session import AnyOrderSession


class LPDSession(AnyOrderSession):
    model: LPD  # type: ignore[assignment]

    def placed(self, x: Tensor, slots: Tensor) -> Tensor:
        return self.model.placed(x, self.positions_of(slots))

    def queries(self, slots: Tensor) -> Tensor:
        return self.model.queries(self.positions_of(slots))

    def mask(self, slots: Tensor, first: int, visible: int) -> Tensor:
        """Tokens, which are at even slots, are seen from their own slot on; a query by itself."""
        slot = self._slot[:visible]
        return (slot <= slots[..., None]) & (slot % 2 == 0) | (slot == slots[..., None])
