"""Load drafters, and check that they fit their target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visar.drafters.acceptance import ACCEPTANCE, AcceptanceHead, drafter_mark, give, width_of
from visar.drafters.base import DRAFTERS, DrafterLoading, DraftKind, drafter_kinds
from visar.engine.component import read_config
from visar.errors import VisarError
from visar.families.source import resolve
from visar.families.weights import load_part
from visar.files import looked_up, path_of


def load_drafter(path: str | Path, target: Any) -> Any:
    """A drafter for a `DrafterTarget`, or for a masked model, of which `DrafterLoading` is enough.

    `path` is a folder of `visar train drafter`, a pipeline's folder or name, or a published file: of a smaller model,
    or LANTERN's drafters. Raises `VisarError` where it is none, or does not fit the target.
    """
    file = looked_up("The drafter", path_of("The drafter", path).expanduser())
    if (released := released_file(file)) is not None:
        state = target.read(released)
        known = (DRAFTERS[kind].published(state, target, str(path)) for kind in drafter_kinds(target.masked))
        model = next((found for found in known if found is not None), None)
        model = target.of_state(state, path) if model is None else model
    else:
        model = _from_folder(path, target)
    kind_of(model, target).check(model, target, str(path))
    return model.eval()


def _from_folder(path: str | Path, target: DrafterLoading) -> Any:
    folder = resolve(path)
    if isinstance(folder, str):
        raise VisarError(f"There is no drafter folder {path}.")
    if (folder / "model_index.json").exists() or (folder / target.folder).is_dir():
        folder = folder / target.folder
    try:
        name, _ = read_config(folder)
    except VisarError as error:
        raise VisarError(f"{path} holds no drafter: {error}") from error
    own = (DRAFTERS[kind].network for kind in drafter_kinds(target.masked))
    networks = {cls.__name__: cls for cls in (target.network, *own) if cls is not None}
    if name not in networks:
        raise VisarError(f"{path} holds a {name}, not a drafter; those are: {', '.join(networks)}.")
    model = load_part(networks[name], folder, "the drafter")
    if (place := folder / ACCEPTANCE).is_dir():
        head = load_part(AcceptanceHead, place, "the drafter's acceptance head")
        width = width_of(model, target)
        if head.config.dim != width:
            raise VisarError(f"The acceptance head {place} reads {head.config.dim} numbers, its drafter gives {width}.")
        if head.config.drafter not in ("", drafter_mark(model)):
            raise VisarError(
                f"The acceptance head {place} was trained for another drafter than that in its folder; delete it, and "
                "`visar train drafter --acceptance` trains one."
            )
        give(model, head)
    return model


def released_file(path: Path) -> Path | None:
    """The weights at a path that is a file, or a folder that LANTERN's trainer wrote; None for other folders."""
    if path.is_file():
        return path
    if (path / "model_index.json").exists():
        return None
    try:
        read_config(path)
    except VisarError:  # which names no class of ours
        files = (path / name for name in ("model.safetensors", "pytorch_model.bin"))
        return next((file for file in files if file.is_file()), None)
    return None


def kind_of(model: Any, target: DrafterLoading) -> DraftKind:
    """The kind of a drafter: networks say it, and those that do not are smaller models."""
    return DRAFTERS[getattr(model, "kind", target.smaller_kind)]
