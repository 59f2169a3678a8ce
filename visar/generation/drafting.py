"""The drafters of a model: those that were given, and those that lie beside it in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visar.drafters import DraftModel
from visar.drafters.loading import kind_of, load_drafter
from visar.errors import VisarError
from visar.families.base import Family
from visar.families.mar.draft import load_draft
from visar.params import CONTINUOUS


class Drafters:
    """By kind, loaded when a sampler first asks for one."""

    def __init__(self, family: Family, folder: Path | None):
        self.family, self.folder = family, folder
        self.loaded: dict[str, Any] = {}

    def has(self, kind: str) -> bool:
        """Whether there is one of this kind."""
        return kind in self.loaded or self._folder(kind) is not None

    def load(self, path: str | Path) -> None:
        """Load one. Raises `VisarError` where it is none, or does not fit the model."""
        if self.family.tokens == CONTINUOUS:
            self.loaded["draft"] = load_draft(path, self.family)
            self.to()
            return
        model = load_drafter(path, self.family.model, self.family.layout.rows)
        self.loaded[kind_of(model)] = model

    def find(self, kind: str) -> Any:
        """The one of this kind, from the model's folder if it was not given; None if there is none."""
        if kind not in self.loaded and (folder := self._folder(kind)) is not None:
            self.load(folder)
        return self.loaded.get(kind)

    def of(self, method: Any) -> DraftModel | None:
        """The drafter that a sampler needs, None if it needs none. Raises `VisarError` where it is missing."""
        kind = getattr(method, "drafter", None)
        if kind is None:
            return None
        if (found := self.find(kind)) is None:
            what = "a smaller model" if kind == "model" else f"a drafter of the kind {kind!r}"
            raise VisarError(f"Sampler {method.name!r} needs {what}; give it with load_drafter, or --drafter PATH.")
        model: DraftModel = found
        return model

    def draft(self, method: Any) -> Any:
        """The smaller model of continuous tokens. Raises `VisarError` where there is none."""
        if (found := self.find("draft")) is None:
            raise VisarError(
                f"Sampler {method.name!r} needs a smaller MAR; give it with load_drafter, or --drafter PATH."
            )
        return found

    def to(self) -> None:
        """Bring those of continuous tokens to where the model is; others follow their session."""
        if (draft := self.loaded.get("draft")) is not None:
            draft.to(self.family.device, self.family.dtype)

    def _folder(self, kind: str) -> Path | None:
        found = self.folder / kind if self.folder is not None else None
        return found if found is not None and found.is_dir() else None
