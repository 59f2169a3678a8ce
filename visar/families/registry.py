"""The families by name: every folder of this package with a `family.py`, and registered ones."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from visar.errors import VisarError
from visar.families import source as sources

if TYPE_CHECKING:
    from visar.families.base import Family

_REGISTERED: dict[str, type[Family]] = {}


def register_family(family: type[Family]) -> type[Family]:
    """A decorator that registers the class under its `name`. Raises `VisarError` if that is taken."""
    known = _REGISTERED.get(family.name)
    if known is not None and (known.__module__, known.__qualname__) != (family.__module__, family.__qualname__):
        raise VisarError(f"There is a family {family.name!r} already; choose another name.")
    _REGISTERED[family.name] = family
    return family


def folders() -> list[str]:
    """The names of the packages in this one, one for each family that ships."""
    package = importlib.import_module("visar.families")
    return sorted(found.name for found in pkgutil.iter_modules(package.__path__) if found.ispkg)


def families() -> Mapping[str, type[Family]]:
    """All families: those that ship and registered ones."""
    for name in folders():
        importlib.import_module(f"visar.families.{name}.family")
    for point in entry_points(group="visar.families"):  # modules of installed packages, which register their families
        point.load()
    return dict(_REGISTERED)


def family_of(source: sources.Source) -> type[Family]:
    """The family of a model, by names and configurations only.

    Raises `VisarError` if none recognises it, and for an image size where a folder has its own.
    """
    found = [family for family in families().values() if family.recognises(source)]
    if not found:
        raise VisarError(sources.unrecognised(source, families()))
    family = found[-1]  # the last registered, so that your own family takes precedence
    if source.folder is not None and source.image_size is not None and not family.sizes:
        raise VisarError(sources.FOR_FILES)
    return family


def family_of_components(names: Any) -> type[Family]:
    """The family with components of these names. Raises `VisarError` if there is none."""
    given = set(names)
    for family in reversed(list(families().values())):
        if family.required and family.required <= given <= family.required | family.optional:
            return family
    raise VisarError(
        f"No family is made of the components {', '.join(sorted(given)) or 'none'}; "
        + "; ".join(
            f"{f.name}: {', '.join(sorted(f.required))}" + (f" [{', '.join(sorted(f.optional))}]" if f.optional else "")
            for f in families().values()
        )
        + "."
    )
