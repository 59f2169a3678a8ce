"""Atomic files, written under a temporary name and then renamed; folders that are written to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from visar.errors import VisarError


def cache_folder() -> Path:
    """The folder of what is computed once for a machine: `$VISAR_CACHE`, or `visar` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VISAR_CACHE") or Path(base) / "visar")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path in the folder of `path`; it is renamed to `path` if the block succeeds, else removed."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def output_folder(path: str | Path) -> Iterator[Path]:
    """`writable_folder`; if the block fails, new folders that are empty are removed."""
    path = Path(path)
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        yield writable_folder(path)
    except BaseException:
        for folder in new:
            with suppress(OSError):
                folder.rmdir()
        raise


def writable_folder(path: str | Path) -> Path:
    """The folder `path`, made if needed. Raises `VisarError` if it is not writable."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".visar.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise VisarError(f"Cannot write to folder {folder}: {error.strerror or error}.") from error
    return folder
