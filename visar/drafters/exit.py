"""Early exit: the target's first layers and a trained block (Kangaroo, Liu et al. 2024, arXiv:2404.18911)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from visar.drafters.base import DrafterTarget, check_fit, fingerprint, register_drafter
from visar.drafters.target_layers import TargetLayers
from visar.engine.component import Component
from visar.engine.layers import RMSNorm
from visar.families.llamagen.gpt import Block
from visar.reading import Size


class ExitHead(Component):
    """A block after the target's first `layers`; `target` is the fingerprint of the model that it was trained for."""

    kind = "exit"

    def __init__(self, dim: Size = 1280, num_heads: Size = 20, ffn: Size = 3584, layers: Size = 2, target: str = ""):
        super().__init__()
        self.block = Block(dim, num_heads, ffn)
        self.norm = RMSNorm(dim)

    def blocks(self, target: Any) -> tuple[list[nn.Module], nn.Module]:
        """What it runs, and the norm after it."""
        return [*target.layers[: self.config.layers], self.block], self.norm


@register_drafter("exit")
class Exit(TargetLayers):
    network = ExitHead

    def check(self, model: ExitHead, target: DrafterTarget, path: str | Path) -> None:
        check_fit(model, target, path, [model.config.layers - 1])

    def default_layers(self, of: int) -> int:
        return min(2, of)

    def new(self, target: DrafterTarget, depth: int, layers: int) -> ExitHead:
        """It starts as the target's last block."""
        c = target.model.config
        made = ExitHead(c.dim, c.num_heads, c.ffn, layers, target=fingerprint(target.model))
        made.block.load_state_dict(target.model.layers[-1].state_dict())
        made.norm.load_state_dict(target.model.norm.state_dict())
        return made
