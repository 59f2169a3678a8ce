"""Objects that a user names as `FILE.py:NAME`: the file is run, so it must be code that you trust."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from visar.errors import VisarError
from visar.texts import check_file

_files: set[Path] = set()  # that were run


def is_place(text: str) -> bool:
    """Whether a text names something in a Python file, and not a sampler or a model."""
    return ".py:" in text


def load(place: str, flag: str, kind: str = "function") -> Any:
    """What `FILE.py:NAME` names, for the option `flag`; the file is run once. A `VisarError` where there is none."""
    name, colon, wanted = place.rpartition(":")
    if not colon or not name.endswith(".py") or not wanted.isidentifier():
        raise VisarError(
            f"{flag} takes a Python file and a {kind} in it, as in my_{flag.strip('-')}.py:make, not {place!r}."
        )
    check_file(Path(name))
    path = Path(name).resolve()
    known = f"visar_user_code_{abs(hash(path))}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(path.parent))  # it may import its neighbours
        sys.modules[known] = module  # before it runs: dataclasses look their module up
        _files.add(path)
        try:
            with blamed():
                spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[known]
            raise
    if not hasattr(sys.modules[known], wanted):
        raise VisarError(f"{name} has no {kind} {wanted!r}.")
    return getattr(sys.modules[known], wanted)


@contextmanager
def blamed() -> Iterator[None]:
    """Turn what goes wrong in the files that were run into a `VisarError` that says where; other errors pass."""
    try:
        yield
    except VisarError:
        raise
    except Exception as error:
        places = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError):
            places.append((error.filename or "", error.lineno))
        places = [(name, line) for name, line in places if Path(name) in _files]
        if not places:
            raise
        name, line = places[-1]
        said = [type(error).__name__, *str(error).strip().splitlines()[:1]]
        raise VisarError(f"{Path(name).name}, line {line}: {': '.join(said).rstrip('.')}.") from error
