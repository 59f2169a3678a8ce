"""Drafters made of some of the target's own layers: those that are not skipped, or the first ones and an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from typing_extensions import Self

from visar.engine.layers import RMSNorm
from visar.families.llamagen.gpt import Block, LlamaGen


def with_layers(target: LlamaGen, layers: Sequence[nn.Module], norm: nn.Module) -> LlamaGen:
    """A LlamaGen of these layers and this norm, which shares all else with the target."""
    with torch.device("meta"):
        view = LlamaGen(**{k: v for k, v in target.config.items() if not k.startswith("_")} | {"num_layers": 0})
    view.register_to_config(num_layers=len(layers))
    view.tok_embeddings, view.cls_embedding, view.output = target.tok_embeddings, target.cls_embedding, target.output
    view.layers, view.norm = nn.ModuleList(layers), norm
    return view.eval()


class SkippedLayers(ConfigMixin, nn.Module):
    """The target with only its `layers`, and no weights of its own (SWIFT, Xia et al. 2024, arXiv:2410.06916).

    SWIFT chooses what to skip while it decodes, for each text anew. Images of one model are alike enough to choose
    once (`visar train drafter --kind skip`), and by whole layers.
    """

    config: Any
    config_name = "config.json"
    kind = "skip"

    @register_to_config
    def __init__(self, layers: Sequence[int] = (), target: str = ""):
        super().__init__()

    def save_pretrained(self, folder: str | Path) -> None:
        ConfigMixin.save_config(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        return cls.from_config(cls.load_config(folder))

    def blocks(self, target: LlamaGen) -> tuple[list[nn.Module], nn.Module]:
        """What it runs, and the norm behind it."""
        return [target.layers[i] for i in self.config.layers], target.norm


class ExitHead(ModelMixin, ConfigMixin):
    """The target's first `layers` and a trained block behind them (Kangaroo, Liu et al. 2024, arXiv:2404.18911).

    The cache is one of its own: unlike the paper's, what the first layers computed is computed again in the test.
    """

    config_name = "config.json"
    kind = "exit"

    @register_to_config
    def __init__(self, dim: int = 1280, num_heads: int = 20, ffn: int = 3584, layers: int = 2, target: str = ""):
        super().__init__()
        self.block = Block(dim, num_heads, ffn)
        self.norm = RMSNorm(dim)

    def blocks(self, target: LlamaGen) -> tuple[list[nn.Module], nn.Module]:
        """What it runs, and the norm behind it."""
        return [*target.layers[: self.config.layers], self.block], self.norm
