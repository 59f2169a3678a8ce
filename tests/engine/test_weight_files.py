"""Files of weights: what each file that cannot be read is, shards in every form, and no memory for lies."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from visar.engine.component import fill, own_tensors
from visar.engine.weight_files import read_content
from visar.errors import VisarError

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(3)}


def torch_bytes(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def zipped(name: str, content: bytes = b"x", packed: bool = False) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def scripted() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), buffer)
    return buffer.getvalue()


OLD = torch_bytes(STATE, _use_new_zipfile_serialization=False)
UNREADABLE: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "empty": ("a.pt", lambda: b"", "it is empty"),
    "Git LFS": ("a.safetensors", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "a web page": ("a.pt", lambda: b"\n<!DOCTYPE html><html>", "it is a web page and not the file"),
    "JSON": ("a.pt", lambda: b'{"error": "Entry not found"}', 'it is JSON .*server: {"error": "Entry not found"}'),
    "text": ("a.ckpt", lambda: "a poem, höchst schön\n".encode() * 400, "it is text, not weights"),
    "random bytes": ("a.pt", lambda: np.random.default_rng(0).bytes(999), "neither a safetensors nor a torch file"),
    "random pickle": ("a.pt", lambda: b"\x80\x02" + np.random.default_rng(0).bytes(99), "truncated or damaged"),
    "one byte": ("a.pt", lambda: b"\x80", "neither a safetensors nor a torch file"),
    "a cut old file": ("a.pt", lambda: OLD[: len(OLD) // 2], "it is truncated or damaged"),
    "a cut old file, early": ("a.pt", lambda: OLD[:20], "it is truncated or damaged"),
    "a cut new file": ("a.pt", lambda: torch_bytes(STATE)[:-30], "the end of the archive is missing"),
    "cut safetensors": ("a.safetensors", lambda: save(STATE)[:-2], r"truncated: it has \d+ of \d+ bytes"),
    "safetensors as .pt": ("a.pt", lambda: save(STATE), r"it is a safetensors file .* rename it to \.safetensors"),
    "torch as .safetensors": ("a.safetensors", lambda: torch_bytes(STATE), r"it is a torch file .* rename it to \.pt"),
    "old as .safetensors": ("a.safetensors", lambda: OLD, r"it is a torch file .* rename it to \.pt"),
    "another zip": ("a.pt", lambda: zipped("notes.txt"), r"it is a zip archive of notes\.txt, not a torch file"),
    "npz": ("a.pt", lambda: zipped("mu.npy"), r"it is an \.npz archive of NumPy"),
    "npy": ("a.pt", lambda: b"\x93NUMPY\x01\x00", "it is an array of NumPy"),
    "gzip": ("a.pt", lambda: b"\x1f\x8b\x08rest", "it is compressed with gzip; unpack it"),
    "Keras": ("a.ckpt", lambda: b"\x89HDF\r\n\x1a\n", "it is an HDF5 file"),
    "a program": ("a.pt", scripted, r"it is a TorchScript program; save its state_dict\(\) alone"),
    "a zip bomb": ("a.pt", lambda: zipped("a/data.pkl", bytes(10**6), packed=True), "its records are compressed"),
    "a NumPy scalar": (
        "a.pt",
        lambda: torch_bytes(STATE | {"fid": np.float64(2.5)}),
        "NumPy .*torch.save or safetensors",
    ),
    "an array": ("a.pt", lambda: torch_bytes({"a": np.ones(2)}), r"NumPy \(numpy.*weights_only=False"),
    "a class": (
        "a.pt",
        lambda: torch_bytes(STATE | {"at": PurePosixPath("x")}),
        r"more than tensors \(pathlib\.PurePosix",
    ),
    "a whole module": ("a.pt", lambda: torch_bytes(nn.Linear(1, 1)), r"more than tensors \(torch\.nn\.modules\.linear"),
    "newer pickle": ("a.pt", lambda: torch_bytes(STATE, pickle_protocol=5), "its pickle is not one"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_each_cause_has_its_own_sentence(kind: str, tmp_path: Path) -> None:
    name, content, message = UNREADABLE[kind]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(VisarError, match=rf"^Cannot read .*{name}: .*{message}") as caught:
        read_content(tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.pt").mkdir()
    os.mkfifo(tmp_path / "pipe.pt")
    for name, message in (
        ("none.pt", "There is no weights file"),
        ("empty", "it is a folder without a file of weights"),
        ("a.pt", "it is a folder without a file of weights"),
        ("pipe.pt", "it is not a regular file"),
    ):
        with pytest.raises(VisarError, match=message):
            read_content(tmp_path / name)
    if os.getuid():
        (tmp_path / "b.pt").write_bytes(OLD)
        (tmp_path / "b.pt").chmod(0)
        with pytest.raises(VisarError, match="Permission denied"):
            read_content(tmp_path / "b.pt")


def test_no_code_of_a_file_runs(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(tmp_path / "ran"), "w")

    for content in (torch_bytes({"a": Code()}), torch_bytes([Code()], _use_new_zipfile_serialization=False)):
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(VisarError, match="it holds more than tensors"):
            read_content(tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Code()))
    with pytest.raises(VisarError):
        read_content(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


def equal(found: dict[str, Tensor]) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("index", [True, False])
def test_shards(suffix: str, index: bool, tmp_path: Path) -> None:
    names = [f"model-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    for name, keys in zip(names, (("a", "c"), ("b",)), strict=True):
        part = {key: STATE[key] for key in keys}
        save_file(part, tmp_path / name) if suffix == "safetensors" else torch.save(part, tmp_path / name)
    if index:
        where = {"a": names[0], "b": names[1], "c": names[0]}
        (tmp_path / f"model.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (tmp_path / "README.md").write_text("text")
    paths = [tmp_path, tmp_path / names[1]] + ([tmp_path / f"model.{suffix}.index.json"] if index else [])
    assert all(equal(read_content(path)) for path in paths)
    (tmp_path / names[0]).unlink()
    for path in paths:
        with pytest.raises(VisarError, match=rf"{names[0]}.* is not there|{names[0]}, which is not there"):
            read_content(path)


def test_indices_that_lie(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors")
    index = tmp_path / "x.safetensors.index.json"
    for where, message in (
        ({"weight_map": {"a": "../a.safetensors"}}, "'../a.safetensors' does not"),
        ({"weight_map": {"a": "/etc/passwd"}}, "'/etc/passwd' does not"),
        ({"weight_map": {"d": "a.safetensors"}}, "says that a.safetensors holds 'd', which no shard does"),
        ({"weight_map": {}}, "names no shards"),
        ({"weight_map": ["a.safetensors"]}, "weight_map should be"),
        ({}, "has no 'weight_map'"),
    ):
        index.write_text(json.dumps(where))
        with pytest.raises(VisarError, match=message):
            read_content(index)


def test_a_folder_with_a_choice(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        torch.save(STATE, tmp_path / name)
    with pytest.raises(VisarError, match=r"a folder with a\.pt and b\.pt; name the file"):
        read_content(tmp_path)
    save_file(STATE, tmp_path / "c.safetensors")
    assert equal(read_content(tmp_path))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1).expand(10**12), r"claims shape \[1000000000000\], of which the file does not hold all"),
        (torch.zeros(2).to_sparse(), "is not dense and real"),
        (torch.zeros(2, dtype=torch.complex64), "is not dense and real"),
        (torch.zeros(2, device="meta"), "is not dense and real"),
        (torch.tensor([1e300], dtype=torch.float64), "NaN or an infinity"),
    ],
)
def test_tensors_that_are_no_weights(tensor: Tensor, message: str) -> None:
    with pytest.raises(VisarError, match=message):
        own_tensors({"a": tensor}, "x.pt")


def test_more_than_the_memory_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visar.host.available_memory", lambda: 1000)
    with pytest.raises(VisarError, match=r"x\.pt needs .* GiB of memory, and .* are free"):
        own_tensors({"a": torch.zeros(400, dtype=torch.float16)}, "x.pt")
    assert own_tensors({"a": torch.zeros(400, dtype=torch.float16)}, "x.pt", None)["a"].shape == (400,)


def test_what_does_not_fit_is_counted() -> None:
    with torch.device("meta"):
        line = nn.Linear(2, 2)
    with pytest.raises(VisarError, match=r"'weight' is missing from x\.pt, and 1 others are\."):
        fill(line, {}, "x.pt")
    state = {"weight": torch.ones(2, 2), "bias": torch.ones(2), "c": torch.ones(1), "d": torch.ones(1)}
    with pytest.raises(VisarError, match=r"a tensor 'c' that this model does not, nor 1 others of it"):
        fill(line, state, "x.pt")
    with pytest.raises(VisarError, match=r"'bias' of x\.pt has torch\.int64 numbers, expected floating-point"):
        fill(line, {"weight": torch.ones(2, 2), "bias": torch.ones(2, dtype=torch.long)}, "x.pt")
