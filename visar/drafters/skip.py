"""Skipped layers: the target with only some of its layers (SWIFT, Xia et al. 2024, arXiv:2410.06916).

SWIFT chooses what to skip while it decodes, for each text again. Images of one model are alike enough to choose once
(`visar train drafter --kind skip`), and by whole layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from visar.drafters.base import DrafterTarget, check_fit, fingerprint, register_drafter
from visar.drafters.loss import DraftLoss
from visar.drafters.target_layers import TargetLayers
from visar.engine.component import Component


class SkippedLayers(Component):
    """The target with only its `layers`, and no weights of its own; `target` is that model's fingerprint."""

    kind = "skip"

    def __init__(self, layers: Sequence[int] = (), target: str = ""):
        super().__init__()

    def blocks(self, target: Any) -> tuple[list[nn.Module], nn.Module]:
        """What it runs, and the norm after it."""
        return [target.layers[i] for i in self.config.layers], target.norm


@register_drafter("skip")
class Skip(TargetLayers):
    network = SkippedLayers

    def check(self, model: SkippedLayers, target: DrafterTarget, path: str | Path) -> None:
        check_fit(model, target, path, model.config.layers or [-1])

    def default_layers(self, of: int) -> int:
        return -(-of // 2)

    def new(self, target: DrafterTarget, depth: int, layers: int) -> SkippedLayers:
        """At first it skips none."""
        return SkippedLayers(list(range(target.model.config.num_layers)), target=fingerprint(target.model))

    def search(self, loss: DraftLoss[Any], batch: Sequence[Tensor], layers: int) -> SkippedLayers:
        """Skip layers one by one, each time the one that lowers acceptance least, until `layers` are left."""
        target_pass, target, chosen = (
            loss.run_target(*batch),
            loss.drafter.config.target,
            list(loss.drafter.config.layers),
        )
        while len(chosen) > layers:
            scores: dict[int, float] = {}
            for layer in chosen:
                loss.drafter = SkippedLayers([i for i in chosen if i != layer], target=target)
                scores[layer] = loss.acceptance(target_pass)[0]
            chosen.remove(max(scores, key=lambda layer: scores[layer]))
        return SkippedLayers(chosen, target=target)
