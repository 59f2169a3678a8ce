"""Captions of images by id: from a manifest, from text files next to the images, or from one JSON file."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import NotRequired, TypedDict

from visar.errors import VisarError
from visar.reading import Name, read_json, read_lines
from visar.texts import read_text

FORM = 'a JSON object of id and caption, as {"000000": "a cat"}, or a file of COCO\'s captions'


class Entry(TypedDict):
    """A line of a manifest; it may have more fields."""

    __pydantic_config__ = {"extra": "allow"}  # type: ignore[misc]  # noqa: RUF012 (pydantic reads it)

    id: int | Name
    file: Name
    prompt: NotRequired[str | None]


def manifest_of(file: Path) -> dict[str, dict[str, Any]]:
    """The lines of a manifest by id, each with an "id" and a "file" of its own, and perhaps a "prompt"."""
    out: dict[str, dict[str, Any]] = {}
    files: set[str] = set()
    for number, record in read_lines(file, Entry):
        name, image = str(record["id"]), record["file"]
        if name in out or image in files:
            raise VisarError(f"Line {number} of {file} repeats an id or a file of a line before, {name!r}.")
        out[name] = dict(record)
        files.add(image)
    if not out:
        raise VisarError(f"{file} names no images.")
    return out


def prompts_of(records: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The prompts of a manifest by id; a line without one, or with null, has none."""
    return {name: record["prompt"] for name, record in records.items() if record.get("prompt") is not None}


def texts_of(files: Mapping[str, Path]) -> dict[str, str]:
    """The text of `<stem>.txt` next to each image that has one, by id; of an empty file none."""
    texts = {name: file.with_suffix(".txt") for name, file in files.items()}
    found = {name: read_text(text).strip() for name, text in texts.items() if text.is_file()}
    return {name: text for name, text in found.items() if text}


def captions_of(file: Path, ids: Sequence[str]) -> dict[str, str]:
    """The captions of `ids` in a JSON file, by id. Raises `VisarError` for a file of another form."""
    if file.suffix.lower() != ".json":
        raise VisarError(f"Captions are read from {FORM}, not from {file}.")
    found: Any = read_json(file, object)
    if isinstance(found, dict) and isinstance(found.get("annotations"), list):
        found = _of_coco(found, file)
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise VisarError(f"{file} is not {FORM}.")
    return {name: found[name] for name in ids if name in found}


def _of_coco(data: Mapping[str, Any], file: Path) -> dict[str, str]:
    """The first caption of each image, as COCO has them (Chen et al. 2015, arXiv:1504.00325), by its file's stem."""
    try:
        stems = {image["id"]: Path(image["file_name"]).stem for image in data["images"]}
        found: dict[str, str] = {}
        for note in sorted(data["annotations"], key=lambda note: note["id"]):
            found.setdefault(stems[note["image_id"]], note["caption"].strip())
    except (KeyError, TypeError, AttributeError) as error:
        raise VisarError(
            f'{file} is not one of COCO\'s captions_*.json: "images" with an id and a file_name, "annotations" with an '
            "id, an image_id and a caption."
        ) from error
    if len(data["annotations"]) > len(found):
        warnings.warn(f"{file} has several captions of an image; the first of each is taken.", stacklevel=2)
    return found
