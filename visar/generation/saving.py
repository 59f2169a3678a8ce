"""Save a model as a folder in diffusers' layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from visar.dtypes import STORED, checked_dtype
from visar.engine.component import Component
from visar.errors import VisarError, unknown
from visar.families.base import Family
from visar.families.catalogue import is_embedded
from visar.files import is_new, new_folder, output_folder, replacing, writable_folder
from visar.generation.model import ImageModel
from visar.text_encoders.words import WordEncoder

# The class in the index. Loaders of diffusers do not find it, so their errors name it.
PIPELINES = {"prompt": "visar.TextToImagePipeline", "class": "visar.ClassToImagePipeline"}


def save(
    model: ImageModel,
    folder: str | Path,
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
    parts_of: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write a model's folder in diffusers' layout, model_index.json last.

    `dtypes` are those of the files by component, by default the component's; they may be smaller than it can run in.
    `parts_of` maps components shared with an embedded model, which are not written, to its name. Raises `VisarError`
    if the folder cannot be written, or the model cannot be saved.
    """
    model.family.check_saving()
    _check(model, dtypes, parts_of)
    with new_folder(folder) if is_new(folder) else output_folder(folder) as written:
        _write(model, written, dtypes, parts_of)


def _parts(model: ImageModel) -> dict[str, Any]:
    """The components, and the drafter that belongs to the folder."""
    draft = model.drafters.find("draft")
    return dict(model.family.components) | ({} if draft is None else {"draft": draft})


def _check(model: ImageModel, dtypes: Any, parts_of: Any) -> None:
    """Raise `VisarError` for what cannot be written, at first: the folder may hold a good model."""
    parts = _parts(model)
    for what, given in (("dtypes", dtypes), ("parts_of", parts_of)):
        if not isinstance(given, Mapping):
            raise VisarError(f"{what} must be a dictionary by component, not a {type(given).__name__}.")
        for name in given:
            if name not in parts:
                raise unknown("component", name, parts)
    for name in parts_of.values():
        if not isinstance(name, str) or not is_embedded(name):
            raise VisarError(f"Components are shared with an embedded model, which {name!r} is not.")
    for part, dtype in dtypes.items():
        if isinstance(module := parts[part], Component):
            module.check_stored(dtype)
        elif dtype is not None:  # its file has a dtype of its own
            checked_dtype("The dtype of a file", dtype, STORED)


def _write(model: ImageModel, folder: Path, dtypes: Mapping[str, torch.dtype], parts_of: Mapping[str, str]) -> None:
    family: Family = model.family
    parts = _parts(model)
    index: dict[str, Any] = {"_class_name": PIPELINES[family.condition], "_family": family.name, **family.settings}
    for part, module in parts.items():
        if part != "draft":
            index[part] = [type(module).__module__, type(module).__name__]
        if part in parts_of:
            if isinstance(module, WordEncoder) and module.concepts is not None:
                module.concepts.save(writable_folder(folder / part))
            continue
        if isinstance(module, Component):
            module.save_pretrained(folder / part, dtypes.get(part))
        else:
            module.save_pretrained(folder / part)
            _forget_origin(folder / part / "config.json")
    if parts_of:
        index["_parts_of"] = dict(parts_of)
    with replacing(folder / "model_index.json") as temporary:
        temporary.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _forget_origin(file: Path) -> None:
    """Remove the path that a component of another library was loaded from."""
    config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if config.pop("_name_or_path", None):
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
