"""Text files as editors save them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from visar.errors import LONGEST, VisarError, short
from visar.texts import check_prompt, lines_of, read_text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes("a café\r\n💩\n".encode(encoding))
    assert lines_of(read_text(tmp_path / "a.txt")) == ["a café", "💩"]


def test_a_pipe_is_read(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    writer = threading.Thread(target=pipe.write_text, args=("cat",), daemon=True)
    writer.start()
    assert read_text(pipe) == "cat"


def test_lines() -> None:
    assert lines_of("a\u2028b\x0bc\x85d\rsecond\r\n\nfourth\n\r\n\n") == ["a\u2028b\x0bc\x85d", "second", "", "fourth"]
    assert lines_of("") == lines_of("\n\n") == []


def test_what_is_no_text(tmp_path: Path) -> None:
    for content, message in ((b"\xff\xfe", "no UTF-8"), (b"\xe9t\xe9", "no UTF-8"), (b"c\0a\0t\0", "save it as UTF-8")):
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(VisarError, match=message):
            read_text(tmp_path / "a.txt")
    for gone, message in (("gone.txt", "There is no"), (".", "a folder"), ("x" * 300, "Cannot read"),
                          ("/dev/zero", "not a regular file"), ("/dev/full", "not a regular file")):  # fmt: skip
        with pytest.raises(VisarError, match=message):
            read_text(tmp_path / gone)
    check_prompt("💩")
    with pytest.raises(VisarError, match="no valid text"):
        check_prompt("cat \udcff")


def test_long_messages_are_cut() -> None:
    error = VisarError(f"No word of {'zebra ' * 200_000} is\nknown.")
    assert len(str(error)) < LONGEST + 100 and str(error).startswith("No word of zebra") and "\n" not in str(error)
    assert str(error).endswith("is known.") and short("a sentence.") == "a sentence."
