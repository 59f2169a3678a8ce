"""A smaller model of the target's own kind, with a cache of its own (Leviathan et al. 2023, arXiv:2211.17192)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from visar.drafters.base import DrafterLoading, DrafterTarget, DraftKind, register_drafter
from visar.drafters.loss import DraftLoss, TargetPass, attention


class SmallModelLoss(DraftLoss[Any]):
    """It has embeddings and an output head of its own: the target is its teacher."""

    def steps(self, target_pass: TargetPass) -> list[Tensor]:
        condition, _, tokens = target_pass.given
        x = self._target().embedded(self.drafter, condition, tokens, self.guidance.active)
        hidden = self.drafter.run(
            x, self._table(self.drafter, x, target_pass.prefix), attention([target_pass.causal()], [], [])
        )
        return [hidden[:, target_pass.prefix - 1 :]]

    def logits(self, hidden: Tensor) -> Tensor:
        return self.drafter.logits(hidden)


@register_drafter("model")
class SmallModel(DraftKind):
    loss = SmallModelLoss

    def check(self, model: Any, target: DrafterLoading, path: str | Path) -> None:
        target.check(model, path)

    def default_layers(self, of: int) -> int:
        return -(-of // 3)

    def new(self, target: DrafterTarget, depth: int, layers: int) -> Any:
        return target.smaller(layers)


@register_drafter("draft")
class MaskedModel(DraftKind):
    """A smaller masked model. Its samplers run its session themselves; `visar train mar` trains one."""

    masked = True

    def check(self, model: Any, target: DrafterLoading, path: str | Path) -> None:
        target.check(model, path)
