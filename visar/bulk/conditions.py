"""The conditions of a run: prompts or classes from a file, and the one of each image."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visar.errors import VisarError
from visar.files import path_of
from visar.params import is_list, plain
from visar.reading import parse_json, short
from visar.texts import check_prompt, lines_of, read_text

FORM = '{"prompt": "..."}'
AS_TEXT = "Classes are given as 0-999 or 1,5,7-9, or as a file of these"
CLASSES = 10**6  # at most


@dataclass(frozen=True)
class Condition:
    """`value`: a prompt or a class id. `id` is its name in the file, `metadata` the file's other fields."""

    value: str | int
    id: str | int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def conditions_of(given: Any) -> list[Condition]:
    """Prompts or class ids, of which one is no sequence: a text is not its letters."""
    several = is_list(given) or isinstance(given, Iterator)
    return [c if isinstance(c, Condition) else Condition(plain(c)) for c in (given if several else [given])]


def read_prompts(file: str | Path) -> list[Condition]:
    """The prompts of a .txt file, one in each line, or of a .jsonl file of {"prompt": ..., "id": ...} objects.

    Other fields of an object are its metadata. Raises `VisarError` for a file that cannot be read, an empty or invalid
    line, and an id that is given twice.
    """
    path = path_of("The file of prompts", file)
    form = path.suffix.lower()
    if form not in (".txt", ".jsonl"):
        raise VisarError(
            f"Prompts are read from a .txt or .jsonl file, not from {file}: a prompt, or {FORM}, in each line."
        )
    lines = _lines(path)
    if form == ".txt":
        for number, line in enumerate(lines, 1):
            if not line.strip():
                raise VisarError(f"Line {number} of {file} is empty; give a prompt in each line.")
            _checked(line, f"Line {number} of {file}")
        return [Condition(line.strip()) for line in lines]
    found = [_from_json(line, f"Line {number} of {file}") for number, line in enumerate(lines, 1)]
    first: dict[str, int] = {}
    for number, condition in enumerate(found, 1):
        if condition.id is not None and first.setdefault(str(condition.id), number) != number:
            raise VisarError(
                f"Lines {first[str(condition.id)]} and {number} of {file} have the same id {condition.id!r}."
            )
    return found


def read_classes(text: str | Path) -> list[Condition]:
    """Classes such as "0-999" or "1,5,7-9", or a file with such a list in each line.

    Raises `VisarError` for an invalid list, and for a class that is given twice.
    """
    if not isinstance(text, str | Path):
        raise VisarError(f"{AS_TEXT}, not as a {type(text).__name__}.")
    text = str(text)
    lines = _lines(Path(text)) if len(text) < 1000 and Path(text).is_file() else [text]
    classes: list[int] = []
    for part in (part.strip() for line in lines for part in line.split(",")):
        first, _, last = part.partition("-")
        try:
            numbers = range(int(first), int(last or first) + 1)
        except ValueError:
            numbers = range(0)
        if len(classes) + max(0, numbers.stop - numbers.start) > CLASSES:
            raise VisarError(f"At most {CLASSES} classes can be given, and {part!r} is more.")
        if not numbers:
            raise VisarError(f"{AS_TEXT}, not as {part!r}.")
        classes += numbers
    twice = [c for c, times in Counter(classes).items() if times > 1]
    if twice:
        raise VisarError(f"Class {twice[0]} is given twice; name each class once, and -n says how many images.")
    return [Condition(c) for c in classes]


class Interleaved:
    """Images by id: image i has condition i % P, and its image index counts earlier images of the same value.

    The image index is i // P, unless conditions repeat. It does not depend on the number of images.
    """

    def __init__(self, conditions: Sequence[Condition]):
        self.conditions = list(conditions)
        for c in self.conditions:
            if isinstance(c.value, bool) or not isinstance(c.value, str | int):
                raise VisarError(f"Images are made of prompts or of class ids, not of {short(c.value)}.")
            if isinstance(c.id, bool) or not isinstance(c.id, str | int | None):
                raise VisarError(f"The id of a condition is a text or a whole number, not {short(c.id)}.")
        kinds = {"class" if isinstance(c.value, int) else "prompt" for c in self.conditions}
        if len(kinds) != 1:
            raise VisarError("Give prompts, or classes, and at least one.")
        (self.kind,) = kinds
        self._times: Counter[str | int] = Counter()
        self._before = []
        for condition in self.conditions:
            self._before.append(self._times[condition.value])
            self._times[condition.value] += 1

    def condition(self, i: int) -> Condition:
        return self.conditions[i % len(self.conditions)]

    def index(self, i: int) -> int:
        turn, number = divmod(i, len(self.conditions))
        return turn * self._times[self.condition(i).value] + self._before[number]

    def mark(self) -> str:
        """A hash of all conditions, with their ids and metadata; a `VisarError` where JSON cannot hold these."""
        try:
            rows = json.dumps([[c.value, c.id, dict(c.metadata)] for c in self.conditions], allow_nan=False)
        except (TypeError, ValueError) as error:
            raise VisarError(f"The metadata of a condition must be what JSON has: {error}.") from error
        return hashlib.sha256(rows.encode()).hexdigest()


def _lines(path: Path) -> list[str]:
    """The lines of a file. Raises `VisarError` if there are none, or the file cannot be read."""
    lines = lines_of(read_text(path))
    if not lines:
        raise VisarError(f"{path} is empty.")
    return lines


def _checked(prompt: str, where: str) -> None:
    try:
        check_prompt(prompt)
    except VisarError as error:
        raise VisarError(f"{where}: {error}") from error


def _from_json(line: str, where: str) -> Condition:
    try:
        entry = parse_json(line, dict[str, Any], where)
    except VisarError as error:
        raise VisarError(f"{error} Give {FORM} in each line.") from error
    if "prompt" not in entry:
        raise VisarError(f"{where} has no prompt; give {FORM} in each line.")
    if not isinstance(entry["prompt"], str):
        raise VisarError(f"{where} has a prompt that is no text, {json.dumps(entry['prompt'])}; give {FORM}.")
    if not entry["prompt"].strip():
        raise VisarError(f"{where} has an empty prompt.")
    _checked(entry["prompt"], where)
    name = entry.get("id")
    if isinstance(name, bool) or not isinstance(name, str | int | None):
        raise VisarError(f"{where} has an id that is neither text nor a whole number: {name!r}.")
    return Condition(entry["prompt"], name, {k: v for k, v in entry.items() if k not in ("prompt", "id")})
