"""Arrays of .npz files whose headers promise what is not there."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from visar.errors import VisarError
from visar.eval.quality.image_folder import ImageFolder
from visar.eval.quality.metrics.frechet import load_moments


def written(path: Path, packed: bool = False, **arrays: tuple[str, str, bytes]) -> Path:
    """An .npz of arrays with headers of any kind: dtype, shape, and the bytes after the header."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        for name, (dtype, shape, content) in arrays.items():
            header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}}}".encode().ljust(117) + b"\n"
            archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content)
    return path


def test_rows_that_are_not_there(tmp_path: Path) -> None:
    row = bytes(48)
    for shape in ("(1000000000000, 4, 4, 3)", "(10**12, 4, 4, 3)", "(-1, 4, 4, 3)", "(1000000000000, 0, 4, 3)", "(2,)"):
        file = written(tmp_path / "a.npz", arr_0=("|u1", shape, row))
        with pytest.raises(VisarError, match=r"`arr_0` of .*a\.npz"):
            ImageFolder.open(file)
    assert len(ImageFolder.open(written(tmp_path / "a.npz", arr_0=("|u1", "(1, 4, 4, 3)", row)))) == 1


def test_moments_that_are_not_there(tmp_path: Path) -> None:
    two, four = bytes(16), np.eye(2).tobytes()
    for mu, sigma, message in (
        (("<f8", "(1000000000000,)", two), ("<f8", "(2, 2)", four), r"`mu` .*claims to be float64 \[1000000000000\]"),
        (("<f8", "(2,)", two), ("<f8", "(1000000, 1000000)", four), "`sigma` .*claims"),
        (("|O", "(2,)", two), ("<f8", "(2, 2)", four), "`mu` .*holds Python objects, which visar never unpickles"),
        (("<U2", "(2,)", two), ("<f8", "(2, 2)", four), "`mu` .*must be numbers, not <U2"),
        (("<f8", "(0,)", b""), ("<f8", "(0, 0)", b""), "do not fit"),
    ):
        with pytest.raises(VisarError, match=message):
            load_moments(written(tmp_path / "m.npz", mu=mu, sigma=sigma))
    whole = {"mu": ("<f8", "(2,)", two), "sigma": ("<f8", "(2, 2)", four)}
    assert load_moments(written(tmp_path / "m.npz", **whole)).moments["pool"].mu.tolist() == [0, 0]
    for n, message in ((b"\0" * 8, "2 or more"), (b"\xff" * 8, "2 or more")):
        with pytest.raises(VisarError, match=message):
            load_moments(written(tmp_path / "m.npz", **whole, n=("<i8", "()", n)))
    for text in ("{", '{"a": NaN}', "[" * 300, "3"):
        made = ("<U" + str(len(text)), "()", text.encode("utf-32-le"))
        with pytest.raises(VisarError, match="Cannot read `provenance` of"):
            load_moments(written(tmp_path / "m.npz", **whole, provenance=made))


def test_damaged_archives(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, mu=np.arange(500.0), sigma=np.eye(500))
    content = bytearray(buffer.getvalue())
    content[2000:2010] = bytes(10)
    (tmp_path / "m.npz").write_bytes(content)
    with pytest.raises(VisarError, match="cannot be read"):
        load_moments(tmp_path / "m.npz")
