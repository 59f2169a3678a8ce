"""Files of weights by content, not by name: safetensors and torch files, whole, in shards, or in a folder.

No file runs code: torch files are read with `weights_only`. Each cause for which a file cannot be read has a sentence
of its own, which says what to do.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from visar.errors import VisarError
from visar.reading import Name, read_json

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")  # the first one that a folder has is read
INDEX = ".index.json"
SHARD = re.compile(r"(.*)-(\d{1,6})-of-(\d{1,6})(\.\w+)$")
FOREIGN = (  # what other files begin with
    (b"version https://git-lfs", "it is a pointer of Git LFS and not the file; fetch the file with `git lfs pull`"),
    (b"\x93NUMPY", "it is an array of NumPy; give a torch file or a safetensors file"),
    (b"\x89HDF", "it is an HDF5 file, as Keras writes; give a torch file or a safetensors file"),
    (b"GGUF", "it is a GGUF file; give a torch file or a safetensors file"),
    (b"\x1f\x8b", "it is compressed with gzip; unpack it"),
    (b"7z\xbc\xaf", "it is a 7z archive; unpack it"),
    (b"Rar!", "it is a RAR archive; unpack it"),
    (b"\x89PNG", "it is an image"),
    (b"\xff\xd8\xff", "it is an image"),
    (b"%PDF", "it is a PDF"),
)
RESAVE = (
    "where you trust it, load it with torch.load(FILE, weights_only=False), and save its tensors alone with torch.save "
    "or safetensors"
)


def unreadable(path: str | Path, cause: str) -> VisarError:
    return VisarError(f"Cannot read {path}: {cause}.")


def read_content(path: str | Path) -> Any:
    """What a file holds: for safetensors tensors by name, for a torch file whatever was saved, on the CPU.

    `path` may also be the index of shards, or a folder with one file or all shards, whose tensors are then joined.
    Tensors may be mapped to the file. Raises `VisarError`, with the cause, for a file that cannot be read.
    """
    path = Path(path)
    files, index = _files(path)
    if len(files) == 1 and not index:
        return _read(files[0])
    joined: dict[Any, Any] = {}
    for file in files:
        content = _read(file)
        if not isinstance(content, Mapping):
            raise VisarError(f"{file} holds no weights by name.")
        for key, value in content.items():
            if key in joined:
                raise VisarError(f"Two shards of {path} hold {key!r}.")
            joined[key] = value
    for key, name in index.items():
        if key not in joined:
            raise VisarError(f"{path} says that {name} holds {key!r}, which no shard does.")
    return joined


def _files(path: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The files to read, and the names of the shards by key if there is an index."""
    if path.is_dir():
        path = _of_folder(path)
    if not path.name.endswith(INDEX):
        found = SHARD.match(path.name)
        return (_shards(path, found) if found else [path]), {}
    index = read_json(path, Index).weight_map
    names = sorted(set(index.values()))
    for name in names:
        if Path(name).name != name:
            raise unreadable(path, f"its shards must lie next to it, and {name!r} does not")
        if not (path.parent / name).exists():
            raise VisarError(f"{path} names {name}, which is not there; there must be {len(names)} shards.")
    if not names:
        raise unreadable(path, "it names no shards")
    return [path.parent / name for name in names], index


def _of_folder(folder: Path) -> Path:
    """The file of weights in a folder: an index, a whole file, or the first shard. Raises `VisarError`."""
    try:
        names = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    except OSError as error:
        raise unreadable(folder, error.strerror or str(error)) from error
    if any(name.endswith(".distcp") for name in names):
        raise unreadable(
            folder,
            "it is a distributed checkpoint; make it one file with `python -m torch.distributed.checkpoint.format_utils"
            " dcp_to_torch FOLDER FILE.pt`",
        )
    for suffix in SUFFIXES:
        found = [name for name in names if name.endswith((suffix, suffix + INDEX))]
        indices = [name for name in found if name.endswith(INDEX)]
        whole = [name for name in found if not name.endswith(INDEX) and not SHARD.match(name)]
        series = {match[1] + match[3]: name for name in found if (match := SHARD.match(name))}
        choices = indices + whole if indices else whole + list(series.values())
        if len(choices) > 1:
            raise unreadable(folder, f"it is a folder with {' and '.join(choices[:3])}; name the file to read")
        if choices:
            return folder / choices[0]
    raise unreadable(folder, "it is a folder without a file of weights")


def _shards(path: Path, found: re.Match[str]) -> list[Path]:
    """All shards of the series that `path` is one of. Raises `VisarError` if one is missing."""
    start, number, count, suffix = found.groups()
    if int(count) > 10_000:
        raise unreadable(path, f"it is one of {count} shards, which is not plausible")
    files = [path.with_name(f"{start}-{i:0{len(number)}d}-of-{count}{suffix}") for i in range(1, int(count) + 1)]
    if missing := [file.name for file in files if not file.exists()]:
        raise VisarError(f"{path} is one of {int(count)} shards, of which {missing[0]} is not there.")
    return files


@dataclass
class Index:
    """What `*.index.json` says: the name of the shard by the key of each tensor."""

    weight_map: dict[str, Name]


def _read(path: Path) -> Any:
    head = _head(path)
    safe, length = path.suffix == ".safetensors", int.from_bytes(head[:8], "little")
    is_safetensors = head[8:9] == b"{" and 2 <= length <= 2**27
    is_zip = head[:4] in (b"PK\x03\x04", b"PK\x05\x06")
    is_pickle = head[:1] == b"\x80" and b"\2" <= head[1:2] <= b"\5" and not is_safetensors  # its length may be 0x280
    if safe and (is_zip or is_pickle):
        raise unreadable(path, "it is a torch file under the name of a safetensors file; rename it to .pt")
    if is_safetensors:
        if not safe:
            raise unreadable(path, f"it is a safetensors file under the name *{path.suffix}; rename it to .safetensors")
        return _safetensors(path, length)
    if is_zip:
        _check_zip(path)
    elif not is_pickle or safe:
        raise unreadable(path, _foreign(path, head))
    return _torch(path, is_zip)


def _head(path: Path) -> bytes:
    """The first bytes of a file. Raises `VisarError` for a file that cannot be opened, and for an empty one."""
    if not path.exists():
        raise VisarError(f"There is no weights file {path}.")
    if path.is_dir():
        raise unreadable(path, "it is a folder; name the file in it")
    if not path.is_file():
        raise unreadable(path, "it is not a regular file")
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise unreadable(path, error.strerror or str(error)) from error
    if not head:
        raise unreadable(path, "it is empty, so its download or copy failed; fetch it again")
    return head


def _foreign(path: Path, head: bytes) -> str:
    """What a file is that holds no weights."""
    for magic, what in FOREIGN:
        if head.startswith(magic):
            return what
    if head[257:262] == b"ustar":
        return "it is a tar archive; unpack it"
    try:
        text = head.decode("utf-8-sig", errors="strict" if len(head) < 4096 else "ignore").strip()
    except UnicodeDecodeError:
        text = "\0"
    if any(ord(c) < 32 and c not in "\t\n\r\f\x1b" for c in text):
        return "it is neither a safetensors nor a torch file, or damaged"
    if text.startswith("<"):
        return "it is a web page and not the file, so its download failed; fetch it again, logged in if it needs that"
    if text.startswith(("{", "[")):
        return f"it is JSON and not weights, perhaps the error of a server: {' '.join(text[:60].split())}"
    return "it is text, not weights"


def _safetensors(path: Path, length: int) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        size = path.stat().st_size
        if size < (wanted := _wanted(path, length)):
            raise unreadable(path, f"it is truncated: it has {size} of {wanted} bytes; fetch it again") from error
        raise unreadable(path, f"it is damaged ({_line(error)}); fetch it again") from error


def _wanted(path: Path, length: int) -> int:
    """The bytes that a safetensors file should have, as far as its header tells."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(8 + length)[8:])
        return 8 + length + max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
    except (OSError, ValueError, RecursionError, TypeError, KeyError, IndexError, AttributeError):
        return 8 + length


def _check_zip(path: Path) -> None:
    """Raise `VisarError` for an archive that torch did not write."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    # NotImplementedError is zipfile's, for a compression or version that it does not have.
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise unreadable(path, "it is truncated: the end of the archive is missing; fetch it again") from error
    names = [member.filename for member in members]
    if not any(name.endswith("data.pkl") for name in names):
        if any(name.endswith(".npy") for name in names):
            raise unreadable(path, "it is an .npz archive of NumPy arrays; give a torch file or a safetensors file")
        raise unreadable(path, f"it is a zip archive of {', '.join(names[:2]) or 'nothing'}, not a torch file")
    if any(name.endswith("constants.pkl") for name in names):
        raise unreadable(path, "it is a TorchScript program; save its state_dict() alone")
    # torch stores its records as they are: those that unpack to more would fill the memory.
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise unreadable(path, "its records are compressed, which torch does not do; save it again with torch.save")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise unreadable(path, "it is damaged: its records are longer than the file")


def _torch(path: Path, is_zip: bool) -> Any:
    try:
        # The training scripts store their arguments with the weights, as a namespace of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except OSError as error:
        raise unreadable(path, error.strerror or _line(error)) from error
    except pickle.UnpicklingError as error:
        if found := re.search(r"(?:GLOBAL|class|type) ([A-Za-z_][\w.]{2,80})", str(error)):
            name = found[1]
            what = "a number or an array of NumPy" if name.startswith("numpy") else "more than tensors"
            raise unreadable(path, f"it holds {what} ({name}), and reading it could run code; {RESAVE}") from error
        if "Unsupported operand" in str(error) and is_zip:
            cause = f"it is damaged, or its pickle is not one that torch.save writes by itself; {RESAVE}"
            raise unreadable(path, cause) from error
        raise unreadable(path, _damaged(is_zip)) from error
    except MemoryError as error:
        raise unreadable(path, "it claims more tensors than there is memory") from error
    except Exception as error:  # torch's reader of cut and changed files stumbles in a dozen ways
        raise unreadable(path, _damaged(is_zip)) from error


def _damaged(is_zip: bool) -> str:
    return f"it is {'damaged' if is_zip else 'truncated or damaged'}; fetch it again"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120].rstrip(".") or type(error).__name__
