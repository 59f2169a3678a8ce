"""Sessions whose last condition is the order of each image's cells, and that of a RandAR."""

from __future__ import annotations

from torch import Tensor

from visar.engine.ordered_session import OrderedSession
from visar.families.llamagen.randar import RandAR
from visar.families.llamagen.session import LlamaGenSession


class AnyOrderSession(LlamaGenSession, OrderedSession):
    """As `LlamaGenSession`, after whose conditions come the cells [B, N] in the order of sampling."""

    def embed(self, *condition: Tensor) -> Tensor:
        *own, cells = condition
        self.arrange(cells)
        return super().embed(*own)


class RandARSession(AnyOrderSession):
    model: RandAR  # type: ignore[assignment]

    def queries(self, slots: Tensor) -> Tensor:
        return self.model.queries(self.rotary_rows(slots))
