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

OWN, NOT_CHECKED = "Apache-2.0", "not checked"
H100 = 3.35e12  # bytes a second that an H100 SXM reads, by its data sheet


def floor_ms(numbers: int) -> float:
    """Milliseconds in which an H100 reads so many `numbers` in bfloat16."""
    return 1e3 * 2 * numbers / H100


@dataclass(frozen=True)
class Listing:
    """A model by name. `condition` is "class" or "prompt"; `pixels` are the side lengths of its images.

    `weights` says where the weights are, `licence` is theirs; `needs`, of a published model, which files to give to
    load it. `parameters` are those that decode tokens, with embeddings. `floor_ms` is the least time of a token without
    speculation, by `floor_ms`; None where it does not follow from bytes alone.
    """

    name: str
    title: str
    condition: str
    pixels: tuple[int, ...]
    weights: str = "embedded"
    needs: str = ""
    parameters: int = 0
    licence: str = NOT_CHECKED
    floor_ms: float | None = None


EMBEDDED = (
    Listing("icons", "icons and emoji from a short text", "prompt", (128,), parameters=6_262_016, licence=OWN),
    Listing(
        "icons-two-way",
        "the same in 32 passes, less well (two-way heads)",
        "prompt",
        (128,),
        parameters=8_622_625,
        licence=OWN,
    ),
    Listing("icons-mar", "the same from continuous tokens (MAR)", "prompt", (128,), parameters=3_268_576, licence=OWN),
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
