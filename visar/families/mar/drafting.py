"""A MAR as the target of a smaller MAR that drafts, by `visar.drafters.base.DrafterLoading`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from visar.errors import VisarError
from visar.families.mar.loading import mar_of, read_mar
from visar.families.mar.transformer import MAR


@dataclass(frozen=True)
class MARTarget:
    """Methods are described in `DrafterLoading`."""

    model: MAR

    masked: ClassVar[bool] = True
    smaller_kind: ClassVar[str] = "draft"
    network: ClassVar[Any] = MAR
    folder: ClassVar[str] = "mar"

    def read(self, path: Path) -> dict[str, Tensor]:
        return read_mar(path)

    def of_state(self, state: Mapping[str, Tensor], path: str | Path) -> MAR:
        return mar_of(state, path)

    def check(self, model: MAR, path: str | Path) -> None:
        own, its = self.model.config, model.config
        for what, field in (("token grid", "grid"), ("token size", "token_dim"), ("kind of condition", "condition")):
            if own[field] != its[field]:
                raise VisarError(f"The draft model {path} has another {what}: {its[field]}, not {own[field]}.")
        if own.vae and its.vae and own.vae != its.vae:
            raise VisarError(f"The draft model {path} was trained on the latents of another autoencoder.")
        for field in ("classes",) if own.condition == "class" else ("buffer", "caption_features"):
            if own[field] != its[field]:
                raise VisarError(
                    f"The draft model {path} takes other conditions: {field} {its[field]}, not {own[field]}."
                )
        if own.latest != its.latest:
            raise VisarError(f"The head of the draft model {path} begins at step {its.latest}, not at {own.latest}.")
