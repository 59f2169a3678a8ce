"""A smaller MAR that drafts for another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from visar.errors import VisarError
from visar.families.llamagen.loading import load_part
from visar.families.mar.loading import load_mar
from visar.families.mar.transformer import MAR
from visar.families.source import resolve


def load_draft(path: str | Path, family: Any) -> MAR:
    """A MAR from a published checkpoint file, its own folder, or that of a saved model.

    Raises `VisarError` where there is none, or it does not belong to the `family` that it shall draft for.
    """
    draft = _loaded(path)
    own, its = family.model.config, draft.config
    for what, field in (("token grid", "grid"), ("token size", "token_dim"), ("kind of condition", "condition")):
        if own[field] != its[field]:
            raise VisarError(f"The draft model {path} has another {what}: {its[field]}, not {own[field]}.")
    if own.vae and its.vae and own.vae != its.vae:
        raise VisarError(f"The draft model {path} was trained on the latents of another autoencoder.")
    for field in ("classes",) if own.condition == "class" else ("buffer", "caption_features"):
        if own[field] != its[field]:
            raise VisarError(f"The draft model {path} takes other conditions: {field} {its[field]}, not {own[field]}.")
    if own.latest != its.latest:
        raise VisarError(f"The head of the draft model {path} begins at step {its.latest}, not at {own.latest}.")
    return draft.eval()


def _loaded(path: str | Path) -> MAR:
    file = Path(path).expanduser()
    if file.is_file():
        return load_mar(file)
    folder = resolve(path)
    if isinstance(folder, str):
        raise VisarError(f"There is no model folder {path}.")
    folder = folder / "mar" if (folder / "mar").is_dir() else folder
    try:
        kind = json.loads((folder / "config.json").read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise VisarError(f"{path} holds no MAR: it has no readable config.json.") from error
    if kind != "MAR":
        raise VisarError(f"{path} holds a {kind}, not a MAR.")
    return load_part(MAR, folder, "the draft model")
