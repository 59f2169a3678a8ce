"""The session of a RandAR, whose last condition is the order of each image's cells."""

from __future__ import annotations

from torch import Tensor

from visar.engine.ordered_session import OrderedSession
from visar.families.llamagen.randar import RandAR
from visar.families.llamagen.session import LlamaGenSession


class RandARSession(LlamaGenSession, OrderedSession):
    """As `LlamaGenSession`, after whose conditions come the cells [B, N] in the order of sampling."""

    model: RandAR  # type: ignore[assignment]

    def embed(self, *condition: Tensor) -> Tensor:
        *own, cells = condition
        self.arrange(cells)
        return super().embed(*own)

    def queries(self, rows: Tensor) -> Tensor:
        return self.model.queries(rows)
