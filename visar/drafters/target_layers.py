"""What drafters share that are made of the target's own layers: they draft as any smaller model does.

Each has a cache of its own: what the first layers computed is computed again when the target tests the draft tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from visar.drafters.base import DrafterTarget, DraftKind
from visar.drafters.loss import DraftLoss, TargetPass, attention


class TargetLayersLoss(DraftLoss[Any]):
    """Every token is drafted from the true ones before it, so one step says it all."""

    def steps(self, target_pass: TargetPass) -> list[Tensor]:
        blocks, norm = self.drafter.blocks(self._target().model)
        x, attend = target_pass.x, attention([target_pass.causal()], [], [])
        for i, block in enumerate(blocks):
            x = block(x, target_pass.table, attend, i)
        return [norm(x[:, target_pass.prefix - 1 :])]


class TargetLayers(DraftKind):
    """Its networks have `blocks(target)`: the layers that they run, and the norm after them."""

    loss = TargetLayersLoss

    def decoder(self, model: Any, target: DrafterTarget) -> Any:
        return target.with_layers(*model.blocks(target.model))
