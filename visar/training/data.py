"""Captioned images from any folder, held in memory, split by concept.

A folder (or zip) holds either `pictures.json`, a list of objects with `file`, `caption` and optionally `style`, `tags`,
`concept` and `group`; or images, in any format that Pillow reads, with a text file of the same name next to each. They
are turned as EXIF says.
"""

from __future__ import annotations

import math
import random
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from visar.errors import VisarError
from visar.files import inside
from visar.host import available_memory
from visar.image_files import converted, frames_of, open_image, suffixes
from visar.reading import parse_json
from visar.text_encoders.concepts import Concepts, listed
from visar.texts import LARGEST, decoded

# These styles show one and the same drawing, so a hold-out must take or leave them together.
DRAWING = {"flat": "fluent", "glossy": "fluent", "3d": "fluent"}
SPLITS = ("train", "unseen-concept", "unseen-style")


@dataclass(frozen=True)
class Record:
    """One captioned image; `concept` is what hold-outs are made by."""

    file: str
    caption: str
    style: str = ""
    tags: tuple[str, ...] = ()
    concept: str = ""
    group: str = ""

    @property
    def drawing(self) -> str:
        return DRAWING.get(self.style, self.style)

    def prompt(self, rng: random.Random | None = None) -> str:
        """The prompt "caption, style"; with a generator, varied as users vary it (keywords added, style left out)."""
        words, style = self.caption, self.style
        if rng is not None:
            if self.tags and rng.random() < 0.2:
                extra = " ".join(rng.sample(self.tags, min(len(self.tags), rng.randint(1, 2))))
                words = extra if rng.random() < 0.25 else f"{words} {extra}"
            if rng.random() < 0.1:
                style = ""
        return f"{words}, {style}" if style else words


def _bucket(*key: str) -> int:
    return zlib.crc32("|".join(key).encode()) % 100


def split_of(record: Record, drawings: dict[str, set[str]]) -> str:
    """`train`, `unseen-concept` (4% of concepts) or `unseen-style` (4% of drawings, concept seen in another one)."""
    if _bucket(record.concept) < 4:
        return "unseen-concept"
    # Sorted, because a set's order differs between processes, and so would the winner of a tie.
    chosen = min(sorted(drawings[record.concept]), key=lambda d: _bucket(record.concept, d))
    if len(drawings[record.concept]) > 1 and record.drawing == chosen and _bucket(record.concept, "style") < 4:
        return "unseen-style"
    return "train"


class ImageSet:
    """Records of a folder or zip, and their images as one uint8 tensor."""

    def __init__(self, path: str | Path, styles: tuple[str, ...] = (), without_groups: tuple[str, ...] = ()):
        self.path = Path(path)
        if not self.path.exists():
            raise VisarError(f"No image folder at {self.path}; give a folder or a zip of captioned images.")
        try:
            self._zip = zipfile.ZipFile(self.path) if self.path.is_file() else None
            records = self._listing()
        except VisarError:
            raise
        # NotImplementedError is zipfile's, for a compression that it does not have.
        except (zipfile.BadZipFile, ValueError, KeyError, RuntimeError, NotImplementedError, OSError) as error:
            raise VisarError(f"{self.path} is no image set: {error}.") from error
        _check_known("style", styles, {r.style for r in records})
        _check_known("group", without_groups, {r.group for r in records})
        self.records = [
            r for r in records if (not styles or r.style in styles) and not (r.group and r.group in without_groups)
        ]
        if not self.records:
            raise VisarError(f"{self.path} holds no captioned images; it needs pictures.json or a .txt per image.")
        drawings: dict[str, set[str]] = {}
        for r in self.records:
            drawings.setdefault(r.concept, set()).add(r.drawing)
        self.splits = [split_of(r, drawings) for r in self.records]

    def _listing(self) -> list[Record]:
        names = (
            self._zip.namelist()
            if self._zip
            else [str(p.relative_to(self.path)) for p in self.path.rglob("*") if p.is_file()]
        )
        if "pictures.json" in names:
            given = parse_json(self._read("pictures.json"), list[Record], f"Cannot read {self.path}/pictures.json")
            return [replace(r, concept=r.concept or r.caption) for r in given]
        found = set(names)
        images = [n for n in sorted(names) if Path(n).suffix.lower() in suffixes() and not Path(n).name.startswith(".")]
        pairs = [(n, str(Path(n).with_suffix(".txt"))) for n in images]
        captions = {n: decoded(self._read(t), self.path / t).strip() for n, t in pairs if t in found}
        if bare := [n for n in images if not captions.get(n)]:
            warnings.warn(f"{len(bare)} images of {self.path} have no caption, as {bare[0]}: left out.", stacklevel=4)
        return [Record(n, c, concept=c) for n, c in captions.items() if c]

    def _read(self, name: str) -> bytes:
        if self._zip is None:
            return inside(self.path, name).read_bytes()
        if self._zip.getinfo(name).file_size > LARGEST:
            raise VisarError(f"{name} of {self.path} unpacks to more than {LARGEST >> 20} MiB.")
        return self._zip.read(name)

    def _image(self, file: str) -> Image.Image:
        """An image as it is to be shown, RGBA."""
        name = f"{file} of {self.path}"
        try:
            content = BytesIO(self._read(file))
        except (OSError, KeyError, RuntimeError, zipfile.BadZipFile) as error:
            raise VisarError(f"Cannot read image {name}.") from error
        with open_image(content, name) as image:
            if image.format != "MPO" and (frames := frames_of(image, name)) != 1:
                raise VisarError(f"{name} has {frames} frames; give one image in each file.")
            return ImageOps.exif_transpose(converted(image, "RGBA", name))

    def mark(self) -> str:
        """A hash of the names of the images, and of what is said of them."""
        return sha256(repr(sorted(map(repr, self.records))).encode("utf-8", "surrogatepass")).hexdigest()[:12]

    def indices(self, split: str) -> list[int]:
        """Positions of the records of one of `SPLITS`."""
        return [i for i, s in enumerate(self.splits) if s == split]

    def shares(self, weights: Mapping[str, float]) -> list[float]:
        """How often each image is to be taken: the product of the weights of its style and its group, 1 by default."""
        names = {name for r in self.records for name in (r.style, r.group)}
        for name, weight in weights.items():
            if name not in names:
                raise VisarError(f"No image has the style or group {name!r}.")
            if not 0 <= weight < math.inf:
                raise VisarError(f"The weight of {name!r} must be 0 or more, not {weight}.")
        shares = [weights.get(r.style, 1.0) * weights.get(r.group, 1.0) for r in self.records]
        if not any(shares[i] for i in self.indices("train")):
            raise VisarError("With these weights no image is left for training.")
        return shares

    def known(self) -> Concepts:
        """What a model knows that was trained on the `train` split."""
        records = [self.records[i] for i in self.indices("train")]
        styles = list(dict.fromkeys(r.style for r in records if r.style))
        texts = [text for r in records for text in (r.caption, " ".join(r.tags), r.style)]
        return listed(styles, [(r.group, r.caption) for r in records], texts)

    def pixels(self, size: int) -> Tensor:
        """All images as uint8 [n, 3, size, size], composited on white, Lanczos-resized."""
        if (needed := len(self.records) * 3 * size * size) > (free := available_memory()):
            raise VisarError(
                f"{len(self.records)} images of {size}x{size} pixels need {needed / 2**30:.1f} GiB, and "
                f"{free / 2**30:.1f} GiB are free; give a smaller --size."
            )
        out = torch.empty(len(self.records), 3, size, size, dtype=torch.uint8)
        for i, r in enumerate(self.records):
            image = self._image(r.file)
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            if image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.LANCZOS)
            out[i] = (
                torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)
            )
        return out


def _check_known(what: str, asked: Sequence[str], known: set[str]) -> None:
    """Raise `VisarError` for a style or a group that no image has."""
    for name in asked:
        if name not in known:
            named = ", ".join(sorted(known - {""})) or "none"
            raise VisarError(f"No image has {what} {name!r}; the {what}s are {named}.")


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 pixels to float in [-1, 1]."""
    return pixels.float().div(127.5).sub(1.0)


def spread(rows: list[int], most: int = 48) -> list[int]:
    """At most `most` of the rows, evenly spread: those of one style lie together."""
    return rows[:: -(-len(rows) // most)] if rows else rows
