"""A LlamaGen as the target of drafters, by `visar.drafters.base.DrafterTarget`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visar.engine.component import unfilled
from visar.engine.guidance import Guidance
from visar.errors import VisarError
from visar.families.llamagen.gpt import CaptionEmbedding, LlamaGen, initialise
from visar.families.llamagen.loading import gpt_of
from visar.families.llamagen.session import LlamaGenSession
from visar.families.weights import load_state


@dataclass(frozen=True)
class LlamaGenTarget:
    """A LlamaGen that generates `grid` x `grid` tokens; methods are described in `DrafterTarget`."""

    model: LlamaGen
    grid: int

    masked: ClassVar[bool] = False
    layered: ClassVar[bool] = True
    smaller_kind: ClassVar[str] = "model"
    network: ClassVar[Any] = LlamaGen
    folder: ClassVar[str] = "gpt"

    def read(self, path: Path) -> dict[str, Tensor]:
        return load_state(path)

    def of_state(self, state: Mapping[str, Tensor], path: str | Path) -> LlamaGen:
        return gpt_of(state, path, self.grid)

    def check(self, model: LlamaGen, path: str | Path) -> None:
        if model.scan != "raster":
            what = "has two-way heads, which draft" if model.scan == "diagonal" else "samples in any order, and drafts"
            raise VisarError(f"The drafter {path} {what} for no other model.")
        own, its = model.config, self.model.config
        if own.vocab_size != its.vocab_size:
            raise VisarError(f"The drafter {path} has {own.vocab_size} codes, the target {its.vocab_size}.")
        same = ["condition", "condition_length", "classes" if its.condition == "class" else "caption_features"]
        for field in same:
            if own[field] != its[field]:
                raise VisarError(f"The drafter {path} has {field} {own[field]}, the target {its[field]}.")
        if own.grid != self.grid:
            sizes = f"{own.grid} x {own.grid} tokens, the target {self.grid} x {self.grid}"
            raise VisarError(f"The drafter {path} generates {sizes}.")

    def given(self, encoded: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        condition, *mask = encoded
        return condition, mask[0] if mask else torch.ones(len(condition), 1)

    def embedded(self, model: LlamaGen, condition: Tensor, tokens: Tensor, guided: bool) -> Tensor:
        embed = model.cls_embedding
        parts = [embed(condition)] + ([embed(embed.null_like(condition))] if guided else [])
        return torch.cat([torch.cat(parts), model.tok_embeddings(tokens[:, :-1]).repeat(len(parts), 1, 1)], dim=1)

    def table(self, model: LlamaGen, prefix: int) -> Tensor:
        return model.rotary(self.grid)

    def smaller(self, layers: int) -> LlamaGen:
        heads = self.model.config.num_heads // 2 or 1
        dim = heads * self.model.head_dim
        sizes = dict(num_layers=layers, num_heads=heads, dim=dim, ffn=2 * dim, grid=self.grid)
        made = initialise(LlamaGen(**self._arguments() | sizes))
        own, its = made.cls_embedding, self.model.cls_embedding
        if isinstance(own, CaptionEmbedding) and isinstance(its, CaptionEmbedding):
            own.uncond_embedding.copy_(its.uncond_embedding)  # not trained, as in the target
        return made

    def with_layers(self, layers: Sequence[nn.Module], norm: nn.Module) -> LlamaGen:
        with unfilled():
            view = LlamaGen(**self._arguments() | {"num_layers": 0})
        view.config = self.model.config.replace(num_layers=len(layers))
        for shared in ("tok_embeddings", "cls_embedding", "output"):
            setattr(view, shared, getattr(self.model, shared))
        view.layers, view.norm = nn.ModuleList(layers), norm  # type: ignore[assignment]
        return view.eval()

    def session(self, model: LlamaGen, encoded: Sequence[Tensor], window: int, guidance: Guidance) -> LlamaGenSession:
        side = self.grid
        return LlamaGenSession(model, *encoded, length=side**2, window=window, grid=side, guidance=guidance)

    def _arguments(self) -> dict[str, Any]:
        return dict(self.model.config)
