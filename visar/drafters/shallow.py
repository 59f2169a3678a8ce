"""Drafters made of some of the target's own layers: those that are not skipped, or the first ones and an adapter."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from visar.engine.component import Component, unfilled
from visar.engine.layers import RMSNorm
from visar.families.llamagen.gpt import Block, LlamaGen


def with_layers(target: LlamaGen, layers: Sequence[nn.Module], norm: nn.Module) -> LlamaGen:
    """A LlamaGen of these layers and this norm, which shares all else with the target."""
    with unfilled():
        view = LlamaGen(**target.config.replace(num_layers=0))
    view.config = target.config.replace(num_layers=len(layers))
    view.tok_embeddings, view.cls_embedding, view.output = target.tok_embeddings, target.cls_embedding, target.output
    view.layers, view.norm = nn.ModuleList(layers), norm  # type: ignore[assignment]
    return view.eval()


class SkippedLayers(Component):
    """The target with only its `layers`, and no weights of its own (SWIFT, Xia et al. 2024, arXiv:2410.06916).

    SWIFT chooses what to skip while it decodes, for each text anew. Images of one model are alike enough to choose
    once (`visar train drafter --kind skip`), and by whole layers.
    """

    kind = "skip"

    def __init__(self, layers: Sequence[int] = (), target: str = ""):
        super().__init__()

    def blocks(self, target: LlamaGen) -> tuple[list[nn.Module], nn.Module]:
        """What it runs, and the norm behind it."""
        return [target.layers[i] for i in self.config.layers], target.norm


class ExitHead(Component):
    """The target's first `layers` and a trained block behind them (Kangaroo, Liu et al. 2024, arXiv:2404.18911).

    The cache is one of its own: unlike the paper's, what the first layers computed is computed again in the test.
    """

    kind = "exit"

    def __init__(self, dim: int = 1280, num_heads: int = 20, ffn: int = 3584, layers: int = 2, target: str = ""):
        super().__init__()
        self.block = Block(dim, num_heads, ffn)
        self.norm = RMSNorm(dim)

    def blocks(self, target: LlamaGen) -> tuple[list[nn.Module], nn.Module]:
        """What it runs, and the norm behind it."""
        return [*target.layers[: self.config.layers], self.block], self.norm
