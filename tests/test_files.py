"""Outputs: what is checked before the work, what a failure leaves, and what is written in place of what."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.devices import device
from visar.errors import VisarError
from visar.files import (
    append_line,
    check_output,
    inside,
    is_new,
    locked,
    new_folder,
    reason,
    replacing,
    tidy,
    writable_folder,
)


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def write(path: Path, text: str = "new") -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def test_a_link_stays_and_leads_to_the_new_file(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to("real/a.json")
    for text in ("one", "two"):  # also where the link leads to nothing yet
        write(tmp_path / "link.json", text)
        assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real" / "a.json").read_text() == text
    assert names(tmp_path) == ["link.json", "real", "real/a.json"]
    (tmp_path / "real" / "a.json").chmod(0o600)
    write(tmp_path / "link.json")
    assert (tmp_path / "real" / "a.json").stat().st_mode & 0o777 == 0o600


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe.json")
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    check_output(pipe)
    write(pipe, "through")
    reader.join(10)
    assert got == ["through"] and pipe.is_fifo() and names(tmp_path) == ["pipe.json"]


def test_a_device_is_not_replaced(tmp_path: Path) -> None:
    """As root a rename would put a file in its place."""
    for kind in ("null", "full"):
        path = device(tmp_path / f"{kind}.json", kind)
        before = path.lstat()
        if kind == "null":
            write(check_output(path))
        else:
            with pytest.raises(VisarError, match="No space left on device"):
                write(path)
        assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert names(tmp_path) == ["full.json", "null.json"]


def test_what_cannot_be_written_is_said_before(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "loop.json").symlink_to("loop.json")
    device(tmp_path / "full.json", "full")
    for name, message in (
        ("folder.json", "Is a directory"), ("x" * 300 + ".json", "File name too long"), ("file/a.json", "it is a file"),
        ("loop.json", "Too many levels"), ("full.json", "No space left on device"),
    ):  # fmt: skip
        with tidy(), pytest.raises(VisarError, match=message):
            check_output(tmp_path / name)
    assert names(tmp_path) == ["file", "folder.json", "full.json", "loop.json"]
    for bad in ("", "a\0b", b"a", None):  # the first is not the current folder
        with pytest.raises(VisarError, match="The folder must be a path, not"):
            writable_folder(bad)  # type: ignore[arg-type]
    name = "y" * 250 + ".json"  # as long as a name can be
    write(check_output(tmp_path / name))
    assert (tmp_path / name).read_text() == "new"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    with (
        pytest.raises(VisarError, match=r"^Cannot write .*a\.json: No space left on device\.$"),
        replacing(tmp_path / "a.json"),
    ):
        raise OSError(28, "No space left on device")
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a.json"):  # of something else that was read
        (tmp_path / "gone").read_text()
    (tmp_path / "b").mkdir()
    with pytest.raises(Exception, match="os error") as error:  # safetensors has an error of its own
        save_file({"a": torch.zeros(2)}, tmp_path / "b")
    assert "os error" not in reason(error.value)
    (tmp_path / "b").rmdir()
    assert names(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "old"


def test_a_line_is_one_of_its_own_or_not_there(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    for line in ("one", "two"):
        append_line(file, line)
    assert file.read_text() == "one\ntwo\n"
    file.write_text("one\ntw")  # a kill
    append_line(file, "three")
    assert file.read_text() == "one\ntw\nthree\n"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (17, limit[1]))  # a disk that takes a part of the line
    try:
        with pytest.raises(VisarError, match=r"Cannot write .*log.jsonl: No space left on device\."):
            append_line(file, "four")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert file.read_text() == "one\ntw\nthree\n"


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """It is not another run, and what can do without a lock does."""

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(VisarError, match=re.escape(f"{tmp_path} cannot be locked: {os.strerror(code)}.")),
        locked(tmp_path / ".lock", "taken"),
    ):
        pytest.fail("it was held")
    with locked(tmp_path / ".lock", "taken", needed=False):
        assert names(tmp_path) == [".lock"]
    assert names(tmp_path) == []


def test_a_lock_whose_file_its_last_holder_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has opened that file before tries again: others would lock a new one."""
    file, lock, removed = tmp_path / ".lock", fcntl.flock, []

    def late(*given: Any) -> None:
        lock(*given)
        if not removed:
            removed.append(file.unlink())

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(file, "taken"):
        assert removed and names(tmp_path) == [".lock"]
        with pytest.raises(VisarError, match="taken"), locked(file, "taken"):
            pytest.fail("it was held twice")
    assert names(tmp_path) == []


def test_folders_of_a_failure_are_removed(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with pytest.raises(KeyboardInterrupt), tidy():
        writable_folder(tmp_path / "old")
        writable_folder(tmp_path / "a" / "b")
        with tidy():
            writable_folder(tmp_path / "c" / "d")
        (writable_folder(tmp_path / "kept") / "file").touch()
        raise KeyboardInterrupt
    assert names(tmp_path) == ["kept", "kept/file", "old"]


def test_a_folder_is_made_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in (Path("."), tmp_path / "new" / "x"):
        with pytest.raises(VisarError, match="No space"), new_folder(path) as made:
            (made / "a").touch()
            raise OSError(28, "No space left on device", str(made / "b"))
        assert is_new(path)
        with new_folder(path) as made:
            (made / "a").touch()
        assert [p.name for p in path.iterdir()] == ["a"]
    assert names(tmp_path) == ["here", "here/a", "new", "new/x", "new/x/a"]
    with pytest.raises(VisarError, match="exists: give a folder that is new or empty"), new_folder("."):
        pass


@pytest.mark.parametrize(("nth", "after"), [(1, False), (2, False), (2, True)])
def test_an_existing_folder_is_filled_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int, after: bool
) -> None:
    move, calls = os.replace, list[Path]()

    def interrupted(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == nth and not after:
            raise KeyboardInterrupt
        move(source, target)
        if len(calls) == nth and after:
            raise KeyboardInterrupt

    (out := tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt), new_folder(out) as made:
        (made / "a").write_text("a")
        (made / "b").write_text("b")
        monkeypatch.setattr(os, "replace", interrupted)
    assert names(tmp_path) == ["out"]


def test_what_others_put_there_meanwhile_stays(tmp_path: Path) -> None:
    (out := tmp_path / "out").mkdir()
    with pytest.raises(VisarError, match="Cannot write"), new_folder(out) as made:
        for name in ("a", "b"):
            (made / name).write_text("mine")
            (out / name).mkdir()
            (out / name / "theirs").touch()
    assert all((out / name / "theirs").exists() for name in ("a", "b"))


def test_a_list_names_files_inside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "run" / "sub").mkdir(parents=True)
    (tmp_path / "secret").touch()
    (tmp_path / "run" / "out").symlink_to("../secret")
    (tmp_path / "run" / "in").symlink_to("sub/a")
    (tmp_path / "run" / "up").symlink_to("..")
    for name in ("a", "sub/a", "in", "sub/../a", "..a"):
        assert inside(tmp_path / "run", name) == tmp_path / "run" / name
    for wrong in ("../secret", str(tmp_path / "secret"), "out", "up/secret", "..", "sub/../../secret", "a\0", None, 3):
        with pytest.raises(VisarError, match="not inside it"):
            inside(tmp_path / "run", wrong)
