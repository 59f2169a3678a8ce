"""The models that visar knows by name: embedded ones, and published ones that the families list.

Imports no torch, so that `visar models` starts fast.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from visar.errors import VisarError


@dataclass(frozen=True)
class Listing:
    """A model by name. `condition` is "class" or "prompt"; `pixels` are the side lengths of its images.

    `weights` says where the weights are; `needs`, of a published model, which files to give to load it.
    """

    name: str
    title: str
    condition: str
    pixels: tuple[int, ...]
    weights: str = "embedded"
    needs: str = ""


EMBEDDED = (
    Listing("icons", "icons and emoji from a short text", "prompt", (64,)),
    Listing("icons-mar", "the same from continuous tokens (MAR)", "prompt", (64,)),
)


def catalogue() -> dict[str, Listing]:
    """All models by name: the embedded ones first, then those of every family's `specs.py`."""
    found = list(EMBEDDED)
    package = importlib.import_module("visar.families")
    for part in sorted(p.name for p in pkgutil.iter_modules(package.__path__) if p.ispkg):
        if any(m.name == "specs" for m in pkgutil.iter_modules([str(Path(package.__path__[0]) / part)])):
            found += importlib.import_module(f"visar.families.{part}.specs").listings()
    return {listing.name: listing for listing in found}


def is_embedded(name: str) -> bool:
    return any(listing.name == name for listing in EMBEDDED)


def embedded_folder(name: str) -> Path:
    """The folder of an embedded model. Raises `VisarError` if this installation lacks it."""
    folder = Path(str(resources.files("visar.assets"))) / name
    if not folder.is_dir():
        raise VisarError(f"The embedded model {name!r} is missing from this installation ({folder}).")
    return folder
