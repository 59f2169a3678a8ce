"""Image files as Pillow reads them: which files are images, and which ones Pillow would change without a word.

A file holds one image of 8 bits per channel, and its pixels are taken as they are stored. Animations, images of 16 bits
(of which Pillow drops half), and files that are cut are refused. So are, unless they are photographs: lossy formats,
CMYK (there is no one way to RGB), and images that EXIF says are to be shown turned.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import IO, NamedTuple

from PIL import Image

from visar.errors import VisarError

# Containers of something else, drawings that need another program, and videos.
NO_IMAGES = {"BUFR", "EPS", "FLI", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
LOSSY = {"avif": "AVIF", "jpeg": "JPEG", "jpeg2000": "JPEG 2000", "mpo": "JPEG"}
MODES = {"RGB", "RGBA", "L", "LA", "P", "1"}
PHOTOGRAPHS = MODES | {"CMYK", "YCbCr"}
ORIENTATION = 0x112  # of EXIF; 1 is upright


class Look(NamedTuple):
    """A file's format ("png", "webp", "jpeg", ...), and its size (height, width)."""

    form: str
    size: tuple[int, int]


@cache
def suffixes() -> frozenset[str]:
    """Of the files that Pillow reads as images, in lower case."""
    Image.init()
    return frozenset(s for s, form in Image.registered_extensions().items() if form in {*Image.OPEN} - NO_IMAGES)


def split(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Images by their names, and other files; hidden files and folders are neither."""
    seen = [file for file in sorted(files) if not file.name.startswith(".") and not file.is_dir()]
    return [f for f in seen if f.suffix.lower() in suffixes()], [f for f in seen if f.suffix.lower() not in suffixes()]


def open_image(source: str | Path | IO[bytes], name: object) -> Image.Image:
    """The image, of which only the header is read. Raises `VisarError` for another file, called `name`."""
    try:
        return Image.open(source)
    except Image.DecompressionBombError as error:
        raise VisarError(f"{name} has more pixels than Pillow takes, {most_pixels()}.") from error
    except Exception as error:  # Pillow's readers raise any kind for a damaged file
        raise VisarError(f"{name} is not an image that can be read.") from error


def most_pixels() -> float:
    """Of a file that `open_image` opens."""
    return 2 * (Image.MAX_IMAGE_PIXELS or float("inf"))  # from half of it on Pillow warns


def converted(image: Image.Image, mode: str, name: object) -> Image.Image:
    """The pixels in another mode. Raises `VisarError` for a file that is cut or damaged."""
    try:
        return image.convert(mode)
    except Exception as error:  # as above
        why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise VisarError(f"{name} is not an image that can be read: {why}.") from error


def look(file: Path, photograph: bool = False) -> Look:
    """Format and size of a file, from its header. Raises `VisarError` for one that is refused, as above."""
    with open_image(file, file) as image:
        form = (image.format or "").lower()
        frames = 1 if form == "mpo" else frames_of(image, file)  # those of a camera: the first is the photograph
        if frames != 1:
            raise VisarError(f"{file} has {frames} frames; give one image in each file.")
        if image.mode not in PHOTOGRAPHS or _is_deep(image):
            kind = "16 bits" if _is_deep(image) else image.mode
            raise VisarError(f"{file} has pixels of kind {kind}; images must have 8 bits per channel.")
        if not photograph:
            if image.mode not in MODES:
                raise VisarError(f"{file} has pixels of kind {image.mode}; save it as RGB.")
            if name := "lossy WebP" if form == "webp" and not _lossless_webp(file) else _lossy(image, form):
                raise VisarError(f"{file} is {name}, which changes the metrics; images must be PNG or lossless WebP.")
            if Image.registered_extensions().get(file.suffix.lower(), image.format) != image.format:
                raise VisarError(f"{file} is a {form} file by another name; give it its own suffix.")
            if orientation(image) != 1:
                raise VisarError(f"{file} is to be shown turned, by its EXIF data; save it as it is shown.")
        return Look("jpeg" if form == "mpo" else form, (image.height, image.width))


def frames_of(image: Image.Image, name: object) -> int:
    """The number of images in a file. Raises `VisarError` for a file that is cut between them."""
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception as error:  # as above
        raise VisarError(f"{name} is not an image that can be read.") from error


def orientation(image: Image.Image) -> int:
    """How EXIF says that an image is to be shown, from 1 (as it is) to 8."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would read the whole file for it
    try:
        return int(image.getexif().get(ORIENTATION, 1)) or 1
    except Exception:  # damaged EXIF data say nothing
        return 1


def _is_deep(image: Image.Image) -> bool:
    """Whether Pillow drops bits of the channels, for which it has no mode."""
    return any(
        ";16" in str(tile[3]) or tile[0] == "sgi16" or (tile[0].startswith("ppm") and tile[3][-1] > 255)
        for tile in getattr(image, "tile", ())
        if tile[3] is not None
    )


def _lossy(image: Image.Image, form: str) -> str:
    """The name of a lossy format; "" for others."""
    if form == "tiff" and "jpeg" in str(image.info.get("compression", "")):
        return "JPEG in TIFF"
    return LOSSY.get(form, "")


def _lossless_webp(file: Path) -> bool:
    """Whether the pixels are in a VP8L chunk (RFC 9649); the chunks before it are stepped over."""
    with file.open("rb") as data:
        data.seek(12)
        while len(header := data.read(8)) == 8:
            if header[:4] in (b"VP8L", b"VP8 "):
                return header[:4] == b"VP8L"
            length = int.from_bytes(header[4:], "little")
            data.seek(length + length % 2, 1)
    return False
