"""Images on disk: pairing by id, what is refused, and the fingerprint."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from visar.errors import VisarError
from visar.eval.quality.image_folder import ImageFolder, has_images
from visar.eval.quality.metrics.frechet import load_moments
from visar.image_files import ORIENTATION


def pixels(seed: int, height: int = 6, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, seed: int = 0, **options: Any) -> None:
    Image.fromarray(pixels(seed)).save(path, **options)


def with_manifest(folder: Path, names: str = "cab") -> list[dict[str, Any]]:
    """Ids whose order is neither that of the files nor that of the manifest."""
    files = {"a": "2.png", "b": "0.png", "c": "1.png"}
    records = [{"id": n, "file": files[n], "prompt": f"a {n}", "index": i, "seed": 3} for i, n in enumerate(names)]
    for record in records:
        save(folder / record["file"], ord(record["id"]))
    (folder / "manifest.jsonl").write_text("\n".join(json.dumps(r) for r in records) + "\n")
    return records


def test_a_plain_folder(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        save(tmp_path / f"{name}.png", ord(name))
    (tmp_path / "c.txt").write_text("of c\n")
    (tmp_path / "a.txt").write_text("of a")
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / ".hidden.png").write_text("")
    found = ImageFolder.open(tmp_path)
    assert found.ids == ("a", "b", "c") and len(found) == 3
    assert found.size == (6, 8) and found.format == "png" and not found.records
    assert found.captions == {"c": "of c", "a": "of a"}
    (batch,) = found.batches()
    assert batch.dtype == torch.uint8 and batch.shape == (3, 3, 6, 8)
    assert all(np.array_equal(batch[i].permute(1, 2, 0), pixels(ord(name))) for i, name in enumerate("abc"))


def test_batches_of_chosen_ids(tmp_path: Path) -> None:
    with_manifest(tmp_path)
    found = ImageFolder.open(tmp_path)
    assert [len(batch) for batch in found.batches(size=2)] == [2, 1]
    (batch,) = found.batches(["c", "a"])
    assert all(np.array_equal(batch[i].permute(1, 2, 0), pixels(ord(name))) for i, name in enumerate("ca"))
    with pytest.raises(VisarError, match="no image of id 'd'"):
        next(found.batches(["a", "d"]))
    with pytest.raises(VisarError, match="1 or more images, not 0"):
        next(found.batches(size=0))


def test_a_manifest_pairs_by_id(tmp_path: Path) -> None:
    records = with_manifest(tmp_path)
    found = ImageFolder.open(tmp_path)
    assert found.ids == ("a", "b", "c")
    assert found.captions == {"a": "a a", "b": "a b", "c": "a c"}
    assert found.records == {r["id"]: r for r in records}
    (batch,) = found.batches()
    assert all(np.array_equal(batch[i].permute(1, 2, 0), pixels(ord(name))) for i, name in enumerate("abc"))


def test_numbers_are_sorted_by_value(tmp_path: Path) -> None:
    names = ["10", "9", "a2", "a10", "a1b", "01", "1", "b", "²"]
    for name in names:
        save(tmp_path / f"{name}.png")
    assert ImageFolder.open(tmp_path).ids == ("01", "1", "9", "10", "a1b", "a2", "a10", "b", "²")


def test_missing_and_extra_images(tmp_path: Path) -> None:
    with_manifest(tmp_path)
    save(tmp_path / "9.png")
    with pytest.raises(VisarError, match=r"1 images are not in .*manifest.jsonl, as .*9.png"):
        ImageFolder.open(tmp_path)
    (tmp_path / "9.png").unlink()
    (tmp_path / "0.png").unlink()
    with pytest.raises(VisarError, match=r"1 images of .*manifest.jsonl are missing, as .*0.png"):
        ImageFolder.open(tmp_path)


def test_images_in_folders_of_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    save(tmp_path / "some" / "x.png")
    (tmp_path / "manifest.jsonl").write_text('{"id": 7, "file": "some/x.png", "class": 3}\n\n')
    found = ImageFolder.open(tmp_path)
    assert found.ids == ("7",) and found.captions == {} and found.records["7"]["class"] == 3
    save(tmp_path / "some" / "y.png")
    with pytest.raises(VisarError, match=r"not in .*manifest.jsonl, as .*y.png"):
        ImageFolder.open(tmp_path)


@pytest.mark.parametrize("text, message", [
    ('{"id": "a", "file": "2.png"}\n{"id": "a", "file": "0.png"}', "Line 2 .* repeats an id or a file"),
    ('{"id": "a", "file": "2.png"}\n{"id": "b", "file": "2.png"}', "Line 2 .* repeats an id or a file"),
    ('{"id": "a"}', "Line 1 of .*: it has no 'file'"),
    ("no", "Line 1"), ("[]", "Line 1"), ("", "names no images"),
])  # fmt: skip
def test_bad_manifests(tmp_path: Path, text: str, message: str) -> None:
    with_manifest(tmp_path)
    (tmp_path / "manifest.jsonl").write_text(text)
    with pytest.raises(VisarError, match=message):
        ImageFolder.open(tmp_path)


def test_a_manifest_with_prompts_that_are_no_text(tmp_path: Path) -> None:
    save(tmp_path / "0.png")
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_bytes(b'\xef\xbb\xbf{"id": "a", "file": "0.png", "prompt": "b\xe2\x80\xa8c"}\r\n')
    assert ImageFolder.open(tmp_path).captions == {"a": "b\u2028c"}
    manifest.write_text('{"id": "a", "file": "0.png", "prompt": null}')
    assert ImageFolder.open(tmp_path).captions == {}
    manifest.write_text('{"id": "a", "file": "0.png", "prompt": 7}')
    with pytest.raises(VisarError, match=r"Line 1 of .*: prompt should be a valid string, not 7"):
        ImageFolder.open(tmp_path)
    (tmp_path / "run").mkdir()
    for file in ("../0.png", str(tmp_path / "0.png")):
        (tmp_path / "run" / "manifest.jsonl").write_text(json.dumps({"id": "a", "file": file}))
        with pytest.raises(VisarError, match="not inside it"):
            ImageFolder.open(tmp_path / "run")


def test_every_format_is_read_or_named(tmp_path: Path) -> None:
    """A .gif next to .png files was left out of the metric without a word."""
    for i, name in enumerate(("a.png", "b.gif", "c.tif", "d.bmp", "e.PPM", "f.tga")):
        Image.fromarray(pixels(i)).convert("P" if name == "b.gif" else "RGB").save(tmp_path / name)
    (tmp_path / "a.txt").write_bytes("of a 💩\r\n".encode("utf-16"))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfof b")
    (tmp_path / "._a.png").write_text("x")
    found = ImageFolder.open(tmp_path)
    assert found.ids == tuple("abcdef") and found.format == "bmp+gif+png+ppm+tga+tiff"
    assert found.captions == {"a": "of a 💩", "b": "of b"}
    (batch,) = found.batches(["c", "d", "e", "f"])
    assert all(np.array_equal(batch[i - 2].permute(1, 2, 0), pixels(i)) for i in (2, 3, 4, 5))
    (tmp_path / "notes.pdf").touch()
    (tmp_path / "more").mkdir()
    save(tmp_path / "more" / "z.png")
    with pytest.warns(UserWarning) as told:
        assert len(ImageFolder.open(tmp_path)) == 6
    said = [str(note.message) for note in told]
    assert "1 files of" in said[0] and "as notes.pdf" in said[0] and "1 folders of images" in said[1]


def test_captions_of_coco(tmp_path: Path) -> None:
    for name in ("COCO_val2014_000000000042", "x"):
        save(tmp_path / f"{name}.png")
    images = [{"id": 42, "file_name": "COCO_val2014_000000000042.jpg"}, {"id": 7, "file_name": "x.jpg"}]
    notes = [{"id": i, "image_id": n, "caption": c} for i, n, c in ((9, 42, "second"), (3, 42, "first "), (5, 7, "x"))]
    file = tmp_path / "captions_val2014.json"
    file.write_text(json.dumps({"info": {}, "images": images, "annotations": notes}))
    with pytest.warns(UserWarning, match="several captions of an image; the first of each"):
        found = ImageFolder.open(tmp_path, captions=file)
    assert found.captions == {"COCO_val2014_000000000042": "first", "x": "x"}
    for text, message in (
        ('{"annotations": [{"id": 1}], "images": []}', "is not one of COCO's captions"),
        ('{"x": "a", "x": "b"}', "it has 'x' twice"), ('[{"id": "x", "caption": "a"}]', "is not a JSON object of id"),
        ("[" * 100_000, "too deep"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(VisarError, match=message):
            ImageFolder.open(tmp_path, captions=file)
    with pytest.raises(VisarError, match="Captions are read from a JSON object"):
        ImageFolder.open(tmp_path, captions=tmp_path / "captions.tsv")


def test_captions_from_a_file(tmp_path: Path) -> None:
    for name in ("1", "2"):
        save(tmp_path / f"{name}.png")
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"2": "two", "1": "one", "3": "three"}))
    found = ImageFolder.open(tmp_path, captions=captions)
    assert found.captions == {"1": "one", "2": "two"}
    found.require_captions("CLIP")
    for text, message in (
        ("[1]", "not a JSON object"),
        ("{", "Cannot read .*captions.json"),
        ('{"1": 2}', "not a JSON object"),
    ):
        captions.write_text(text)
        with pytest.raises(VisarError, match=message):
            ImageFolder.open(tmp_path, captions=captions)
    with pytest.raises(VisarError, match=r"CLIP needs a caption for every image, and 2 of .* have none, as '1'"):
        ImageFolder.open(tmp_path).require_captions("CLIP")


def turned() -> Image.Exif:
    """EXIF data of a camera that was held upright."""
    found = Image.Exif()
    found[ORIENTATION] = 6
    return found


def deep_png(side: int = 4) -> bytes:
    """RGB of 16 bits, which Pillow does not write, and reads as 8."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 16, 2, 0, 0, 0)
    rows = zlib.compress(bytes(4 * (1 + 4 * 6)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def refused(path: Path, **options: bool) -> str:
    with pytest.raises(VisarError) as error:
        for _ in ImageFolder.open(path, **options).batches():
            pass
    return str(error.value)


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda p: save(p / "a.jpg"), "is JPEG, which changes the metrics"),
        (lambda p: save(p / "a.png", format="JPEG"), "is JPEG"),  # whatever it is called
        (lambda p: save(p / "a.webp", quality=80), "is lossy WebP"),
        (lambda p: save(p / "a.webp", quality=80, exif=b"Exif\0\0", icc_profile=b"x"), "is lossy WebP"),
        (lambda p: save(p / "a.png", format="BMP"), "is a bmp file"),
        (lambda p: save(p / "a.tif", compression="jpeg"), "is JPEG in TIFF"),
        (lambda p: save(p / "a.jp2"), "is JPEG 2000"),
        (lambda p: save(p / "a.gif", save_all=True, append_images=[Image.fromarray(pixels(1))]), "has 2 frames"),
        (lambda p: save(p / "a.png", save_all=True, append_images=[Image.fromarray(pixels(1))]), "has 2 frames"),
        (lambda p: Image.new("CMYK", (4, 4)).save(p / "a.tif"), "pixels of kind CMYK"),
        (lambda p: save(p / "a.png", exif=turned()), "to be shown turned"),
        (lambda p: (p / "a.ppm").write_bytes(b"P6 2 2 65535\n" + bytes(24)), "16 bits"),
        (lambda p: (p / "a.png").write_bytes(deep_png()), "16 bits"),
        (lambda p: (p / "a.png").write_bytes(deep_png(side=60_000)), "more pixels than Pillow takes"),
        (lambda p: (p / "a.png").touch(), "not an image that can be read"),
        (lambda p: (p / "a.png").symlink_to("gone.png"), "not an image that can be read"),
        (lambda p: Image.fromarray(np.zeros((4, 4), np.uint16)).save(p / "a.png"), "8 bits per channel"),
        (lambda p: Image.new("RGBA", (4, 4), (1, 2, 3, 254)).save(p / "a.png"), "transparent pixels"),
        (lambda p: Image.new("LA", (4, 4), (1, 0)).save(p / "a.png"), "transparent pixels"),
        (lambda p: (p / "a.png").write_text("text"), "not an image that can be read"),
        (lambda p: (save(p / "a.png"), (p / "a.png").write_bytes((p / "a.png").read_bytes()[:90])), "can be read"),
        (lambda p: (save(p / "a.png"), save(p / "a.webp", lossless=True)), "have one name"),
        (lambda p: (p / "a.txt").write_text("text"), "no images in"),
    ],
)
def test_what_is_refused(tmp_path: Path, write: Callable[[Path], object], message: str) -> None:
    write(tmp_path)
    assert message in refused(tmp_path)


def test_what_is_read(tmp_path: Path) -> None:
    """Grey, palettes, full opacity and lossless WebP (with other chunks before the pixels) are as good as RGB."""
    image = Image.fromarray(pixels(5))
    image.convert("L").save(tmp_path / "a.png")
    image.quantize(300 % 256).save(tmp_path / "b.png")
    image.convert("RGBA").save(tmp_path / "c.png")
    image.save(tmp_path / "d.webp", lossless=True)
    image.save(tmp_path / "e.webp", lossless=True, exif=b"Exif\0\0", icc_profile=b"x")
    found = ImageFolder.open(tmp_path)
    assert found.format == "png+webp"
    (batch,) = found.batches()
    assert all(np.array_equal(batch[i].permute(1, 2, 0), pixels(5)) for i in (2, 3, 4))
    assert np.array_equal(batch[0], np.array(image.convert("L"))[None].repeat(3, 0))
    assert np.array_equal(batch[1].permute(1, 2, 0), np.array(image.quantize(300 % 256).convert("RGB")))


def test_photographs(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg", exif=turned())  # as it is stored
    for name, side in (("b", 4), ("c", 4), ("d", 7)):
        Image.new("RGB", (side, 5)).save(tmp_path / f"{name}.png")
    found = ImageFolder.open(tmp_path, jpeg_allowed=True, mixed_allowed=True)
    assert found.size is None and found.format == "jpeg+png"
    assert [tuple(batch.shape) for batch in found.batches()] == [(1, 3, 6, 8), (2, 3, 5, 4), (1, 3, 5, 7)]
    message = refused(tmp_path, jpeg_allowed=True)
    assert "must have one size: a.jpg is 8x6, b.png 4x5" in message


@pytest.mark.parametrize("save_npz", [np.savez, np.savez_compressed])
def test_an_npz(tmp_path: Path, save_npz: Callable[..., None]) -> None:
    rows = np.stack([pixels(i) for i in range(12)])
    save_npz(tmp_path / "batch.npz", arr_0=rows, mu=np.zeros(3))
    found = ImageFolder.open(tmp_path / "batch.npz")
    assert found.ids[:2] == ("00", "01") and len(found) == 12
    assert found.size == (6, 8) and found.format == "npz"
    batches = list(found.batches(size=5))
    assert [len(b) for b in batches] == [5, 5, 2]
    assert np.array_equal(torch.cat(batches).permute(0, 2, 3, 1), rows)
    (some,) = found.batches(["03", "11"])
    assert np.array_equal(some.permute(0, 2, 3, 1), rows[[3, 11]])
    with pytest.raises(VisarError, match="in the order of their rows only"):
        next(found.batches(["11", "03"]))
    assert has_images(tmp_path / "batch.npz") and has_images(tmp_path)


def test_bad_npz(tmp_path: Path) -> None:
    for arrays, message in (
        ({"arr_1": np.zeros(3)}, "holds no images"),
        ({"arr_0": np.zeros((2, 4, 4, 3))}, r"must be uint8 \[N, H, W, 3\], not float64 \[2, 4, 4, 3\]"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, "must be uint8"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, "must be uint8"),
        ({"arr_0": np.array([{}], dtype=object)}, "holds Python objects, which visar never unpickles"),
    ):
        np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
        with pytest.raises(VisarError, match=message):
            ImageFolder.open(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[: len(whole) // 2])
    for opened in (ImageFolder.open, load_moments):
        with pytest.raises(VisarError, match=r"a\.npz is damaged or cut short: "):
            opened(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_text("text")
    (tmp_path / "c.zip").write_text("text")
    for name, message in (("b.npz", "holds no images"), ("c.zip", "neither a folder"), ("d", "no images at")):
        with pytest.raises(VisarError, match=message):
            ImageFolder.open(tmp_path / name)
    assert not has_images(tmp_path / "b.npz") and not has_images(tmp_path / "d")


def test_the_fingerprint_is_of_ids_and_contents(tmp_path: Path) -> None:
    def made(name: str, files: dict[str, int]) -> str:
        (tmp_path / name).mkdir()
        for file, seed in files.items():
            save(tmp_path / name / f"{file}.png", seed)
        return ImageFolder.open(tmp_path / name).fingerprint()

    first = made("1", {"a": 1, "b": 2})
    assert first == made("2", {"b": 2, "a": 1}) and len(first) == 64
    assert len({first, made("3", {"a": 2, "b": 1}), made("4", {"a": 1, "c": 2}), made("5", {"a": 1})}) == 4
    np.savez(tmp_path / "a.npz", arr_0=np.stack([pixels(0), pixels(1)]))
    np.savez_compressed(tmp_path / "b.npz", arr_0=np.stack([pixels(0), pixels(1)]))
    one, two = (ImageFolder.open(tmp_path / f"{name}.npz").fingerprint() for name in "ab")
    assert one == two != first
