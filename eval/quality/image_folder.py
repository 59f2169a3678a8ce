"""Images on disk as evaluation reads them: a folder of files or an ADM batch, with ids, captions and a fingerprint.

Everything is paired by id and never by order. Every format that Pillow reads is an image, and a note names other files;
hidden files are left alone, and folders in the folder are not searched. JPEG is refused by default because it changes
FID (Parmar et al. 2022, arXiv:2104.11222); lossy WebP is JPEG by another name. An image with transparent pixels is
refused: what it looks like depends on what is behind it. `visar.image_files` says what else is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visar.errors import VisarError
from visar.eval.quality.arrays import names_in, opened
from visar.eval.quality.captions import captions_of, manifest_of, prompts_of, texts_of
from visar.files import inside
from visar.image_files import converted, look, open_image, split

MANIFEST = "manifest.jsonl"
COMPANIONS = {MANIFEST, "run.json"}  # files of a run that are no images


@dataclass(frozen=True)
class ImageFolder:
    """`ids` are sorted, numbers in them by value. `captions` and `records` (lines of the manifest) are by id, and lack
    an id that has none.

    `size` is (height, width), and None where sizes differ and that was allowed. `format` is of the files: "png",
    "webp", "jpeg", several joined by "+", or "npz". Without a manifest ids are file stems, or row numbers of an npz.
    """

    path: Path
    ids: tuple[str, ...]
    files: dict[str, Path]  # empty for an npz
    size: tuple[int, int] | None
    format: str
    captions: dict[str, str] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    @staticmethod
    def open(
        path: str | Path, jpeg_allowed: bool = False, mixed_allowed: bool = False, captions: str | Path | None = None
    ) -> ImageFolder:
        """Read every file's header, and no file in full.

        `jpeg_allowed` (and other lossy formats) and `mixed_allowed` (sizes) are for sets of photographs, as COCO is.
        These are taken as they are stored, whatever EXIF says, and CMYK as Pillow converts it. `captions` is a JSON
        file {id: caption}, or one of COCO's, for images without a manifest and without `<stem>.txt` next to each.
        """
        path = Path(path)
        if not path.exists():
            raise VisarError(f"There are no images at {path}.")
        if path.is_dir():
            found = _open_folder(path, jpeg_allowed, mixed_allowed, None if captions is None else Path(captions))
        elif path.suffix == ".npz":
            found = _open_npz(path)
        else:
            raise VisarError(f"{path} is neither a folder of images nor an .npz batch.")
        if captions is not None:
            found.captions.update(captions_of(Path(captions), found.ids))
        return found

    def __len__(self) -> int:
        return len(self.ids)

    def batches(self, ids: Sequence[str] | None = None, size: int = 32) -> Iterator[Tensor]:
        """uint8 tensors [B, 3, H, W], B at most `size`, of the given ids (default: all) in their order.

        Where sizes differ, a batch ends before an image of another size. Rows of an npz come in their own order only,
        so that the file is read once, from front to end.
        """
        if size < 1:
            raise VisarError(f"A batch must hold 1 or more images, not {size}.")
        wanted = self.ids if ids is None else tuple(ids)
        if strange := sorted(set(wanted) - set(self.ids)):
            raise VisarError(f"{self.path} has no image of id {strange[0]!r}.")
        pending: list[Tensor] = []
        for image in self._rows(wanted) if self.format == "npz" else map(self._read, wanted):
            if pending and (len(pending) == size or image.shape != pending[0].shape):
                yield torch.stack(pending)
                pending = []
            pending.append(image)
        if pending:
            yield torch.stack(pending)

    def fingerprint(self) -> str:
        """sha256 (hex) of ids and contents; captions and where the files lie do not matter."""
        total = hashlib.sha256()
        if self.format == "npz":
            contents = (image.numpy().tobytes() for image in self._rows(self.ids))
        else:
            contents = (self.files[name].read_bytes() for name in self.ids)
        for name, content in zip(self.ids, contents, strict=True):
            total.update(json.dumps(name).encode() + hashlib.sha256(content).digest())
        return total.hexdigest()

    def require_captions(self, what: str) -> None:
        """`VisarError` unless every image has a caption."""
        if without := [name for name in self.ids if name not in self.captions]:
            raise VisarError(
                f"{what} needs a caption for every image, and {len(without)} of {self.path} have none, as "
                f"{without[0]!r}: give a manifest, <stem>.txt next to each image, or a JSON file of captions."
            )

    def _read(self, name: str) -> Tensor:
        """One image [3, H, W], uint8."""
        file = self.files[name]
        with open_image(file, file) as image:
            clear = image.mode in ("RGBA", "LA") or "transparency" in image.info
            pixels = np.array(converted(image, "RGBA" if clear else "RGB", file))
        if clear and pixels[:, :, 3].min() < 255:
            raise VisarError(f"{file} has transparent pixels; save it as RGB on a background.")
        pixels = np.ascontiguousarray(pixels[:, :, :3])
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def _rows(self, wanted: Sequence[str]) -> Iterator[Tensor]:
        """Rows [3, H, W] of the npz, one at a time: 50,000 images of 256 pixels would take 10 GB."""
        if list(wanted) != sorted(wanted):  # numbers of one width
            raise VisarError(f"Images of {self.path} can be read in the order of their rows only.")
        assert self.size is not None
        chosen, shape = set(wanted), (*self.size, 3)
        with opened(self.path, "arr_0") as (data, *_):
            for name in self.ids:
                content = data.read(shape[0] * shape[1] * 3)
                if len(content) != shape[0] * shape[1] * 3:
                    raise VisarError(f"{self.path} ends before its last image.")
                if name in chosen:
                    yield torch.from_numpy(np.frombuffer(content, np.uint8).reshape(shape).copy()).permute(2, 0, 1)


def has_images(path: Path) -> bool:
    """Whether this is a folder, or an .npz with images in it, perhaps next to moments, as ADM's references are."""
    return path.is_dir() or "arr_0" in names_in(path)


def _open_folder(path: Path, jpeg_allowed: bool, mixed_allowed: bool, given: Path | None) -> ImageFolder:
    records = manifest_of(path / MANIFEST) if (path / MANIFEST).exists() else {}
    if records:
        files = {name: inside(path, record["file"]) for name, record in records.items()}
        if missing := [file for file in files.values() if not file.is_file()]:
            raise VisarError(f"{len(missing)} images of {path / MANIFEST} are missing, as {missing[0]}.")
        named = set(files.values())
        folders = sorted({path, *(f.parent for f in named)})
        extra = [file for at in folders for file in split([*at.iterdir()])[0] if file not in named]
        if extra:
            raise VisarError(f"{len(extra)} images are not in {path / MANIFEST}, as {extra[0]}.")
        captions = prompts_of(records)
    else:
        files = {}
        images, besides = split([*path.iterdir()])
        for file in images:
            if file.stem in files:
                raise VisarError(f"{files[file.stem]} and {file} have one name, so one id; rename one.")
            files[file.stem] = file
        captions = texts_of(files)
        texts = {f"{stem}.txt" for stem in files}
        _tell_left_out(path, [f for f in besides if f.name not in COMPANIONS | texts and f != given])
    if not files:
        raise VisarError(f"There are no images in {path}; every format that Pillow reads is one, best PNG.")
    looks = {name: look(file, jpeg_allowed) for name, file in files.items()}
    sizes = {size for _, size in looks.values()}
    if len(sizes) > 1 and not mixed_allowed:
        (one, (_, a)), *others = looks.items()
        two, b = next((name, size) for name, (_, size) in others if size != a)
        differ = f"{files[one].name} is {a[1]}x{a[0]}, {files[two].name} {b[1]}x{b[0]}"
        raise VisarError(f"Images of {path} must have one size: {differ}.")
    formats = "+".join(sorted({form for form, _ in looks.values()}))
    size = sizes.pop() if len(sizes) == 1 else None
    return ImageFolder(path, tuple(sorted(files, key=_number_order)), files, size, formats, captions, records)


def _number_order(name: str) -> tuple[list[str | int], str]:
    """Sorts "2" before "10": the Inception score of splits needs the order that a batch of the same images has."""
    parts = re.split("([0-9]+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def _tell_left_out(path: Path, others: list[Path]) -> None:
    """Name what lies in the folder and is not measured."""
    if others:
        warnings.warn(f"{len(others)} files of {path} are no images and left out, as {others[0].name}.", stacklevel=4)
    folders = [f for f in sorted(path.iterdir()) if f.is_dir() and not f.name.startswith(".")]
    if within := [f for f in folders if split([*f.iterdir()])[0]]:
        warnings.warn(f"{len(within)} folders of images in {path} are left out, as {within[0].name}.", stacklevel=4)


def _open_npz(path: Path) -> ImageFolder:
    if "arr_0" not in names_in(path):
        raise VisarError(f"{path} holds no images: an .npz batch has them in `arr_0`.")
    with opened(path, "arr_0") as (_, shape, kind, fortran):
        pass
    if len(shape) != 4 or shape[3] != 3 or kind != np.uint8 or fortran or not math.prod(shape):
        raise VisarError(f"`arr_0` of {path} must be uint8 [N, H, W, 3], not {kind} {[*shape]}.")
    digits = len(str(shape[0] - 1))
    ids = tuple(f"{i:0{digits}d}" for i in range(shape[0]))
    return ImageFolder(path, ids, {}, (shape[1], shape[2]), "npz")
