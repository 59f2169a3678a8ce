"""The drafters of a model: loaded ones, and those in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visar.drafters.loading import kind_of, load_drafter
from visar.engine.finite import require_finite_weights
from visar.errors import VisarError
from visar.families.base import Family
from visar.params import CONTINUOUS


def needed(method: Any) -> str | None:
    """The kind of drafter that a sampler needs, None if it needs none."""
    return "draft" if getattr(method, "needs_draft", False) else getattr(method, "drafter", None)


class Drafters:
    """Drafters by kind, loaded when a sampler first needs one."""

    def __init__(self, family: Family, folder: Path | None):
        self.family, self.folder = family, folder
        self.loaded: dict[str, Any] = {}

    def has(self, kind: str) -> bool:
        """Whether there is one of this kind."""
        return self.family.drafting is not None and (kind in self.loaded or self._folder(kind) is not None)

    def load(self, path: str | Path) -> None:
        """Load one. Raises `VisarError` if it is no drafter, or does not fit the model."""
        target = self.family.drafting
        if target is None:
            raise VisarError(f"Models of the family {self.family.name!r} take no drafter.")
        model = load_drafter(path, target)
        self.loaded[kind_of(model, target).name] = model
        self.to()

    def find(self, kind: str) -> Any:
        """The drafter of this kind, loaded from the model's folder if needed; None if there is none."""
        if kind not in self.loaded and self.has(kind) and (folder := self._folder(kind)) is not None:
            self.load(folder)
        return self.loaded.get(kind)

    def of(self, method: Any) -> Any:
        """The drafter that a sampler needs, None if it needs none. Raises `VisarError` if it is missing."""
        if (kind := needed(method)) is None:
            return None
        if (found := self.find(kind)) is None:
            what = {"model": "a smaller model", "draft": "a smaller MAR"}.get(kind, f"a drafter of the kind {kind!r}")
            raise VisarError(f"Sampler {method.name!r} needs {what}; give it with load_drafter, or --drafter PATH.")
        # A drafter's NaN is no draft that a test could reject: its residual would be NaN, too.
        require_finite_weights(found, "the drafter")
        return found

    def to(self) -> None:
        """Move drafters of continuous tokens to the model's device and dtype; sessions move the others."""
        if self.family.tokens == CONTINUOUS:
            for model in self.loaded.values():
                model.to(self.family.device, self.family.dtype)

    def _folder(self, kind: str) -> Path | None:
        found = self.folder / kind if self.folder is not None else None
        return found if found is not None and found.is_dir() else None
