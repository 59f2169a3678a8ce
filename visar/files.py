"""Outputs: checked before the work, written whole or not at all, and nothing left after a failure."""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from visar.errors import VisarError

PROBE = bytes(4096)  # a full disk still takes an empty file
OPEN_FILE = re.compile("/dev/(fd/|stdout$|stderr$)|/proc/")  # it may be a file, which is appended to
_count = itertools.count()  # of temporary files, of which several may be open
_made: ContextVar[list[Path] | None] = ContextVar("made", default=None)  # folders, of the innermost `tidy`


def cache_folder() -> Path:
    """The folder of what is computed once for a machine: `$VISAR_CACHE`, or `visar` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VISAR_CACHE") or Path(base) / "visar")


def path_of(name: str, value: object) -> Path:
    """The path that a caller gives. Raises `VisarError` for what is none; an empty text is not the current folder."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        said = repr(value) if isinstance(value, str) else f"a {type(value).__name__}"
        raise VisarError(f"{name} must be a path, not {said}.")
    return Path(text)


def looked_up(what: str, path: str | Path) -> Path:
    """The path, where the system looks there: `is_dir` and its kin raise `OSError` for a name that is too long.

    Raises `VisarError` where it does not. Whether something is there is for the caller to ask.
    """
    try:
        os.stat(path)
    except ValueError:
        pass  # a text that is no name: nothing is there
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP):
            raise VisarError(f"{what} {path} cannot be read: {reason(error)}.") from error
    return Path(path)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path, whose file becomes `path` if the block succeeds and is removed if not.

    A link stays, and the file that it leads to is replaced; a device or a pipe is written to. Raises `VisarError` where
    `path` cannot be written.
    """
    path = Path(path)
    try:
        device, target = is_device(path), Path(os.path.realpath(path))
        at = Path(tempfile.gettempdir()) if device else target.parent
        name = f".{path.stem[:40]}.{os.getpid()}-{next(_count)}.partial{path.suffix[-20:]}"  # short: at most 255 bytes
        _must_be_writable(target)
    except OSError as error:
        raise cannot_write(path, error) from error
    temporary = at / name
    try:
        yield temporary
        if device:
            with open(path, "ab") as out, open(temporary, "rb") as written:
                shutil.copyfileobj(written, out)
            return
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except Exception as error:
        if not _of_writing(error, {temporary, target, path}):
            raise
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_output(path: str | Path) -> Path:
    """The file `path`, whose folder is made if need be. Raises `VisarError` where it cannot be written."""
    path = Path(path)
    try:
        if is_device(path):
            if path.is_char_device():
                with open(path, "ab", buffering=0) as device:
                    device.write(b"")  # /dev/full refuses even this
            return path
        target = Path(os.path.realpath(path))
        _must_be_writable(target)  # at first, so that nothing is made for it
        writable_folder(target.parent)
        _must_be_writable(target)  # a name that is too long shows where there is a folder
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


def new_file(path: str | Path) -> Path:
    """As `check_output`. Raises `VisarError` for a file that exists."""
    if os.path.isfile(path) and not is_device(Path(path)):
        raise VisarError(f"{path} exists; give another name, or delete it.")
    return check_output(path)


def is_device(path: Path) -> bool:
    """Whether something is there that is neither a file nor a folder, or a name of an open file (/dev/stderr)."""
    with suppress(FileNotFoundError, NotADirectoryError):
        mode = path.stat().st_mode
        return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or bool(OPEN_FILE.match(str(path.absolute())))
    return False


def _must_be_writable(target: Path) -> None:
    """Raise `OSError` for a folder, a file that is read-only, and a name that cannot be."""
    with suppress(FileNotFoundError, NotADirectoryError):
        if stat.S_ISDIR(target.stat().st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        if not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))


def cannot_write(path: Path, error: Exception) -> VisarError:
    return VisarError(f"Cannot write {path}: {reason(error)}.")


def reason(error: Exception) -> str:
    """The system's words for what went wrong with a file, also where a library has wrapped them."""
    if isinstance(error, FileExistsError):
        return "it is a file"  # where a folder is to be made
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if code := re.search(r"os error (\d+)", str(error)):  # safetensors
        return os.strerror(int(code[1]))
    return "the disk took only a part of it" if _is_torch(error) else str(error).strip().rstrip(".")


def _is_torch(error: Exception) -> bool:
    """Whether `torch.save` failed to write; it says no more than where in its source."""
    return isinstance(error, RuntimeError) and bool(re.search("inline_container|PytorchStreamWriter", str(error)))


def _of_writing(error: Exception, paths: set[Path]) -> bool:
    """Whether the error is of one of these paths, and not of something that was read meanwhile."""
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        return error.errno is not None and (error.filename is None or Path(os.fsdecode(error.filename)) in paths)
    return _is_torch(error) or "os error" in str(error)


@contextmanager
def tidy() -> Iterator[None]:
    """If the block fails, the folders that `writable_folder` made in it are removed where they are empty."""
    made: list[Path] = []
    outer, token = _made.get(), _made.set(made)
    try:
        yield
    except BaseException:
        for folder in sorted(made, key=lambda f: len(f.parts), reverse=True):
            with suppress(OSError):
                folder.rmdir()
        raise
    finally:
        _made.reset(token)
        if outer is not None:
            outer += made


@contextmanager
def output_folder(path: str | Path) -> Iterator[Path]:
    """`writable_folder`, which is removed again if the block fails and leaves it empty."""
    with tidy():
        yield writable_folder(path)


def writable_folder(path: str | Path) -> Path:
    """The folder `path`, made if needed. Raises `VisarError` if it is not writable."""
    folder = path_of("The folder", path)
    try:
        new = [f for f in (folder, *folder.parents) if not f.exists()]
        if (made := _made.get()) is not None:
            made += new
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".visar.{os.getpid()}"
        try:
            probe.write_bytes(PROBE)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise VisarError(f"Cannot write to folder {folder}: {reason(error)}.") from error
    return folder


def append_line(path: str | Path, line: str) -> None:
    """Add a line to a file, which is made if need be. What fails to be written leaves the file as it was.

    It is a line of its own also where the last one was cut short. Raises `VisarError` where it cannot be written.
    """
    path, begun = Path(path), b""
    try:
        if path.is_file() and path.stat().st_size:
            with open(path, "rb") as written:
                written.seek(-1, os.SEEK_END)
                begun = b"" if written.read() == b"\n" else b"\n"
        with open(path, "ab", buffering=0) as file:
            data, end = begun + line.encode() + b"\n", os.fstat(file.fileno()).st_size
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except BaseException:
                with suppress(OSError):  # a pipe
                    file.truncate(end)
                raise
    except OSError as error:
        raise cannot_write(path, error) from error


@contextmanager
def locked(path: Path, taken: str, needed: bool = True) -> Iterator[None]:
    """Hold the lock file `path` for the block; the kernel releases it when the process ends.

    Raises `VisarError` with the sentence `taken` if another process has it. Where a system, or the file system, has no
    such locks, that is an error too if the lock is `needed`, and else nothing is held.
    """
    try:
        import fcntl
    except ImportError as error:
        if needed:
            raise VisarError(f"A run in {path.parent} needs a POSIX system, for its file locks.") from error
        yield
        return
    while True:
        try:
            file = open(path, "a")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise cannot_write(path, error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise VisarError(taken) from error
            except OSError as error:
                if needed or error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                    raise VisarError(f"{path.parent} cannot be locked: {reason(error)}.") from error
            if not _leads_to(path, file.fileno()):  # its last holder may have removed it after it was opened here
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _leads_to(path: Path, file: int) -> bool:
    """Whether the open file is the one of this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def is_new(path: str | Path) -> bool:
    """Whether there is nothing at `path`, or an empty folder."""
    out = path_of("The folder", path)
    return not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir()))


def check_new(path: str | Path) -> None:
    """Raise `VisarError` unless `path` `is_new`."""
    if not is_new(path):
        raise VisarError(f"{path} exists: give a folder that is new or empty.")


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder, which becomes `path` when it is filled. Raises `VisarError` unless that `is_new`."""
    check_new(path)
    out = Path(os.path.realpath(path))
    with output_folder(out.parent):
        made = out.with_name(f".{out.name[:40]}.{os.getpid()}.partial")
        try:
            made.mkdir()
            yield made
            if out.exists():  # it stays, with its permissions: it may be where the shell is
                _move_all(made, out)
            else:
                os.replace(made, out)
        except OSError as error:
            if not _of_writing(error, {made, out}) and made not in Path(str(error.filename)).parents:
                raise
            raise cannot_write(Path(path), error) from error
        finally:
            shutil.rmtree(made, ignore_errors=True)


def _move_all(source: Path, target: Path) -> None:
    """Move what is in a folder into an empty one: all of it, or nothing if that fails or is interrupted."""
    names = os.listdir(source)
    try:
        for name in names:
            os.replace(source / name, target / name)
    except BaseException:
        for name in names:
            if not os.path.lexists(source / name):  # it was moved; what else has its name is of others
                os.replace(target / name, source / name)
        raise


def inside(folder: Path, name: object) -> Path:
    """The file of a `name` that a list gives. Raises `VisarError` where it leads out of the folder, also by a link."""
    try:
        path = folder / str(name)
        if not isinstance(name, str) or "\0" in name:
            raise ValueError
        if os.path.basename(path) == name and not path.is_symlink() and name != "..":
            return path  # quick: there may be a hundred thousand
        if path.resolve().is_relative_to(folder.resolve()):
            return path
    except (OSError, ValueError, RuntimeError):  # a loop of links, a name with a zero byte
        pass
    raise VisarError(f"{folder} names a file that is not inside it: {name!r}.")
