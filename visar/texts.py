"""Text files as people save them: UTF-8, or UTF-16 and UTF-32 with a byte order mark, with any ends of lines."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from pathlib import Path

from visar.errors import VisarError

LARGEST = 2**28  # bytes of a file that is read whole
MARKS: Mapping[bytes, str] = {  # that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


def read_text(path: str | Path) -> str:
    """The text of a file or a pipe. Raises `VisarError` if it cannot be read, or is no text."""
    return decoded(read_bytes(path, pipes=True), path)


def read_bytes(path: str | Path, pipes: bool = False) -> bytes:
    """The bytes of a file, or with `pipes` of a pipe, of at most `LARGEST`. Raises `VisarError` for anything else."""
    path = Path(path)
    try:
        check_file(path, pipes)
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, VisarError):
            raise
        raise VisarError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}.") from error
    if len(content) > LARGEST:
        raise VisarError(f"Cannot read {path}: it has more than {LARGEST >> 20} MiB, far too many for what it is.")
    return content


def check_file(path: Path, pipes: bool = False) -> None:
    """Raise `VisarError` unless `path` is a file, or with `pipes` a pipe: a device may give bytes for ever."""
    if not path.exists():
        raise VisarError(f"There is no file {path}.")
    if not (path.is_file() or (pipes and path.is_fifo())):
        raise VisarError(f"Cannot read {path}: it is {'a folder' if path.is_dir() else 'not a regular file'}.")


def decoded(content: bytes, path: str | Path) -> str:
    """The text in the bytes of the file `path`, without a byte order mark."""
    encoding = next((name for mark, name in MARKS.items() if content[:-1].startswith(mark)), "utf-8-sig")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise VisarError(f"Cannot read {path}: it is no UTF-8 text.") from error
    if "\0" in text:
        raise VisarError(f"Cannot read {path}: it is no text, or UTF-16 without a byte order mark; save it as UTF-8.")
    return text


def lines_of(text: str) -> list[str]:
    """Its lines, which end as files' do: U+2028 and other separators that `splitlines` knows are text in a line.

    Empty lines at the end are none.
    """
    return re.split("\r\n|\r|\n", text.rstrip("\r\n")) if text.strip("\r\n") else []


def check_prompt(prompt: str) -> None:
    """Raise `VisarError` for a prompt that is no text: bytes of another encoding become lone surrogates."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise VisarError(f"The prompt {prompt!r} is no valid text; give it in UTF-8.") from error
