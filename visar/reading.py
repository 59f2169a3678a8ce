"""JSON that anybody may have written: read within bounds and checked against a type, or refused in one sentence.

A type is a dataclass, a `TypedDict` or an annotation; pydantic checks it strictly (no text for a number, no fraction
for a whole number, no bool for an int). It is imported when the first file is read, so that help is printed at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_type_hints

from annotated_types import Gt, Interval, Len

from visar.errors import VisarError, unknown
from visar.texts import decoded, lines_of, read_bytes

# Numbers in files, bounded before anything is made of their size.
Count = Annotated[int, Interval(ge=0, le=2**12)]  # of layers, blocks and the like
Size = Annotated[int, Interval(ge=1, le=2**24)]  # a width, or a number of codes, classes, words
Side = Annotated[int, Interval(ge=1, le=2**10)]  # cells along one side of an image
Positive = Annotated[float, Gt(0)]
Name = Annotated[str, Len(1, 4096)]

T = TypeVar("T")


def read_json(path: str | Path, kind: type[T]) -> T:
    """The content of a JSON file. Raises `VisarError` for a file that is not there, no JSON, or not of this type."""
    return parse_json(read_bytes(path), kind, f"Cannot read {path}")


def read_lines(path: str | Path, kind: type[T]) -> Iterator[tuple[int, T]]:
    """The numbers, from 1, and the objects of the lines of a JSON Lines file that are not blank.

    Raises `VisarError` as `read_json` does.
    """
    for number, line in enumerate(lines_of(decoded(read_bytes(path), path)), 1):
        if line.strip():
            yield number, parse_json(line, kind, f"Line {number} of {path}")


def parse_json(text: str | bytes, kind: type[T], where: str) -> T:
    """The value of a JSON text; messages begin with `where`.

    Raises `VisarError` for what is not JSON, a key that is given twice, NaN or infinity, too deep nesting, and a value
    that is not of this type, or out of its range.
    """
    from pydantic import ValidationError

    try:
        if isinstance(text, bytes):
            text = decoded(text, where.removeprefix("Cannot read "))  # which says so itself
        json.loads(text, object_pairs_hook=once, parse_constant=_number, parse_float=_number)
        return cast(T, _adapter(cast(Any, kind)).validate_json(text, strict=True))
    except ValidationError as error:
        raise VisarError(f"{where}: {_problem(error)}.") from error
    except VisarError:
        raise
    except RecursionError as error:
        raise VisarError(f"{where}: it is nested too deeply.") from error
    except ValueError as error:
        raise VisarError(f"{where}: it is not valid JSON ({error}).") from error


def checked_arguments(function: Callable[..., Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values` of a file as keyword arguments of a function, checked against its annotations.

    Raises `VisarError` for an argument that it does not have, and for a value of another type or out of range.
    """
    from pydantic import ValidationError

    hints = _hints(function)
    for name in values:
        if name not in hints:
            raise VisarError(f"{where}: {unknown('setting', name, hints)}")
    found = {}
    for name, value in values.items():
        try:
            found[name] = _adapter(hints[name]).validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            raise VisarError(f"{where}: {_problem(error, name)}.") from error
    return found


def counts_of(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, int]:
    """Those of the arguments that are a `Count`."""
    return {name: value for name, value in values.items() if _hints(function)[name] == Count}


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


@cache
def _hints(function: Callable[..., Any]) -> Mapping[str, Any]:
    """The type of each keyword argument; `Any` where pydantic cannot check it."""
    import inspect

    from pydantic import PydanticSchemaGenerationError

    try:
        known = get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # a family of your own may annotate with names that only type checkers see
        known = {}
    hints = {}
    for name in list(inspect.signature(function).parameters)[1:]:
        hints[name] = known.get(name, Any)
        try:
            _adapter(hints[name])
        except PydanticSchemaGenerationError:
            hints[name] = Any
    return hints


class Twice(ValueError):
    """An object of JSON has a name twice, of which parsers take one or the other."""


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, for `json.loads(object_pairs_hook=)`. Raises `Twice`."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise Twice(f"it has {short(twice)} twice")
    return found


def _number(text: str) -> float:
    value = float(text)
    if not abs(value) < float("inf"):
        raise ValueError(f"{short(text)} is no finite number")
    return value


def _problem(error: Any, name: str = "") -> str:
    """What is wrong first, in words: "num_layers should be a valid integer, not 'two'"."""
    first = error.errors(include_url=False)[0]
    *above, last = ([name] if name else []) + [str(part) for part in first["loc"]] or ["it"]
    where = ".".join([*above, last])
    if first["type"] == "missing":
        return f"{'.'.join(above) or 'it'} has no {last!r}"
    if first["type"] == "json_invalid":
        problem = first["ctx"]["error"]
        if "escape" in problem or "surrogate" in problem:
            return "it has a lone surrogate, which is no valid text"
        return "it is nested too deeply" if "recursion" in problem else f"it is not valid JSON ({problem})"
    if first["type"] in ("too_long", "too_short"):
        end, name = ("most", "max_length") if first["type"] == "too_long" else ("least", "min_length")
        return f"{where[:80]} should have at {end} {first['ctx'][name]} items"
    said = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return f"{where[:80]} {said}, not {short(first['input'])}"


def short(value: Any, most: int = 40) -> str:
    """A value as a message shows it, cut to `most` characters."""
    if isinstance(value, int) and abs(value) >= 10**most:
        return f"a number of {value.bit_length()} bits"
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."
