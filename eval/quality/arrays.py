"""Arrays in an .npz file; each is looked at before anything of its size is made, and none is unpickled."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from visar.errors import VisarError
from visar.host import available_memory

_MOST_PACKED = 1100  # bytes in one byte of a zip archive; deflate reaches 1032
# What damaged archives raise; NotImplementedError is zipfile's, for a compression that it does not have.
_FAILURES = (OSError, KeyError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error, EOFError,
             SyntaxError, MemoryError, TypeError)  # fmt: skip


def names_in(path: str | Path) -> frozenset[str]:
    """The names of the arrays in an .npz; none for anything else. Raises `VisarError` for an .npz that is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return frozenset(name.removesuffix(".npy") for name in archive.namelist())
    except _FAILURES as error:
        if _begins_as_zip(path):
            raise VisarError(f"{path} is damaged or cut short: {_reason(error)}.") from error
        return frozenset()


def _begins_as_zip(path: str | Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError:
        return False


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__


@contextmanager
def opened(path: Path, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[Any], bool]]:
    """An array's bytes from its first number on, its shape, its dtype, and whether columns come first.

    Raises `VisarError` for a file without the array, or with another number of bytes than its header says.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            about = archive.getinfo(f"{name}.npy")
            with archive.open(about) as data:
                version = np.lib.format.read_magic(data)
                read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, fortran, dtype = read[version](data)
                wanted = math.prod(shape) * dtype.itemsize
                most = min(about.compress_size, path.stat().st_size) * _MOST_PACKED
                if dtype.hasobject:
                    raise VisarError(f"`{name}` of {path} holds Python objects, which visar never unpickles.")
                if any(n < 0 for n in shape) or not data.tell() + wanted == about.file_size <= most:
                    claim = f"{dtype} {[*shape]}"[:100]
                    raise VisarError(f"`{name}` of {path} claims to be {claim}, which the file does not hold.")
                yield data, shape, dtype, fortran
    except VisarError:
        raise
    except _FAILURES as error:
        raise VisarError(f"`{name}` of {path} cannot be read: {_reason(error)}.") from error


def numbers(path: Path, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """An array of numbers, as float64. Raises `VisarError` as `opened` does, and where there is too little memory."""
    with opened(path, name) as (data, shape, dtype, fortran):
        if dtype.kind not in "fiu":
            raise VisarError(f"`{name}` of {path} must be numbers, not {dtype}.")
        if (needed := math.prod(shape) * (dtype.itemsize + 8)) > available_memory():
            raise VisarError(f"`{name}` of {path} needs {needed / 2**30:.1f} GiB of memory, which are not free.")
        flat = np.frombuffer(data.read(math.prod(shape) * dtype.itemsize), dtype)
        return flat.reshape(shape, order="F" if fortran else "C").astype(np.float64)


def text(path: Path, name: str) -> str:
    """A single text. Raises `VisarError` as `opened` does."""
    with opened(path, name) as (data, shape, dtype, _):
        if dtype.kind != "U" or shape or dtype.itemsize > 2**26:
            raise VisarError(f"`{name}` of {path} must be one text, not {dtype} {[*shape]}.")
        return str(np.frombuffer(data.read(dtype.itemsize), dtype)[0])
