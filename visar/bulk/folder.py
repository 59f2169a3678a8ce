"""The folder of a run: images and a line about each, consistent even after a kill.

An image is written under a temporary name and renamed; then its line is added to the journal of its rank. So a line
means a complete image, and an image without a line is sampled again. A finished run has its lines in `manifest.jsonl`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Interval, Len, Predicate
from PIL import Image
from typing_extensions import NotRequired, TypedDict

from visar.errors import VisarError
from visar.files import inside, locked, path_of, reason, replacing
from visar.reading import parse_json, read_json

PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
PNG_END = b"IEND\xaeB`\x82"  # the last chunk of every complete PNG file
# The fields that images depend on; the others in run.json may change when a run continues.
IDENTITY = (
    "format", "weights", "drafters", "sampler", "parameters", "settings", "seed", "conditions", "batch", "dtype",
    "tokens", "image_size",
)  # fmt: skip
RUN = "run.json"  # describes a run
Line = dict[str, Any]
Images = Annotated[int, Interval(ge=1, le=10**9)]


class Conditions(TypedDict):
    """What is read of the conditions in run.json: how many there are."""

    conditions: Images


class About(TypedDict):
    """What is read of run.json."""

    count: Images
    conditions: NotRequired[Conditions]
    machines: NotRequired[list[dict[str, Any]]]


ImageLine = TypedDict(  # what is read of an image's line
    "ImageLine",
    {
        "id": Annotated[str, Len(1, 12), Predicate(str.isdecimal)],
        "file": NotRequired[str],
        "prompt": NotRequired[str],
        "prompt_id": NotRequired[int | str],
        "class": NotRequired[Annotated[int, Interval(ge=0, le=2**31)]],
        "metadata": NotRequired[dict[str, Any]],
    },
)
for kind in (Conditions, About, ImageLine):
    setattr(kind, "__pydantic_config__", {"extra": "allow"})  # noqa: B010  # the rest is kept as it is


class RunFolder:
    """A folder with `run.json`, images, and `manifest.jsonl` or the journals of an unfinished run."""

    def __init__(self, path: str | Path):
        self.path = path_of("The folder", path)
        self.manifest = self.path / "manifest.jsonl"
        self._run = self.path / RUN

    def image(self, i: int) -> Path:
        return self.path / f"{i:06d}.png"

    def file(self, line: Line) -> Path:
        """The image of a line. Raises `VisarError` where that is another file than the id's, or a link out of here."""
        image = self.image(int(line["id"]))
        if line.get("file", image.name) != image.name:
            raise VisarError(f"{self.manifest} names {line['file']!r}, and the file of that image is {image.name!r}.")
        return inside(self.path, image.name)

    def count_images(self) -> int:
        """The number of image files, complete or not."""
        with os.scandir(self.path) as entries:
            return sum(entry.name.endswith(".png") and not entry.name.startswith(".") for entry in entries)

    def about(self) -> dict[str, Any] | None:
        """The run's description, None if there is none. Raises `VisarError` if its file is damaged."""
        return dict(read_json(self._run, About)) if self._run.exists() else None

    def check(self, about: Mapping[str, Any]) -> dict[str, Any] | None:
        """The description of the folder's run, None if there is none.

        Raises `VisarError` if it differs from `about`, which may have fewer fields, if it has more images, or if the
        folder has images, or a manifest, of something else.
        """
        found = self.about()
        if found is None:
            images = self.path.is_dir() and self.count_images() > 0
            if images or self.manifest.exists():
                its = "images" if images else f"a {self.manifest.name}"
                raise VisarError(f"{self.path} holds {its} of something else; give another folder.")
            return None
        pairs = [pair for key in IDENTITY if key in about for pair in _pairs(key, found.get(key), about[key])]
        differing = [f"{name} was {old}, now {new}" for name, old, new in pairs if old != new]
        if differing:
            raise VisarError(f"{self.path} holds a run with other settings: {'; '.join(differing)}.")
        if "count" in about and about["count"] < found["count"]:
            raise VisarError(f"{self.path} holds a run of {found['count']} images; give -n {found['count']} or more.")
        return found

    def describe(self, about: Mapping[str, Any]) -> None:
        """Write run.json."""
        with replacing(self._run) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps(about, indent=2) + "\n")
            _to_disk(file)

    def forget_if_empty(self) -> None:
        """Remove run.json if there are no images, nor a manifest, which would then be nobody's."""
        if not self.count_images() and not self.manifest.exists():
            self._run.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove temporary files of killed runs. Only with the locks of all ranks."""
        for pattern in (".*.partial.*", ".visar.*"):
            for file in self.path.glob(pattern):
                file.unlink(missing_ok=True)

    def done(self) -> dict[int, Line]:
        """The lines of all complete images, by id."""
        found: dict[int, Line] = {}
        for file in (self.manifest, *sorted(self.path.glob(".journal.*"))):
            if file.exists():
                found.update((int(line["id"]), line) for line in _whole_lines(file))
        return {i: line for i, line in sorted(found.items()) if is_whole(self.image(i))}

    def finish(self, count: int) -> None:
        """Merge the journals into the manifest. Raises `VisarError` if images are missing."""
        lines = self.done()
        missing = sum(i not in lines for i in range(count))
        if missing:
            raise VisarError(f"{missing} images of {self.path} are gone; start the run again to sample them.")
        with replacing(self.manifest) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(lines[i]) + "\n" for i in range(count))
            _to_disk(file)
        for journal in self.path.glob(".journal.*"):
            journal.unlink()

    def finished(self) -> list[Line]:
        """The lines of the manifest. Raises `VisarError` if there is no finished run."""
        about = self.about()
        if about is None:
            raise VisarError(f"{self.path} holds no run of `visar sample`.")
        lines = list(_whole_lines(self.manifest)) if self.manifest.exists() else []
        there = [i for i, line in enumerate(lines) if int(line["id"]) == i and is_whole(self.image(i))]
        if not lines or len(there) != about["count"] or len(lines) != about["count"]:
            raise VisarError(
                f"The run in {self.path} is not finished, or images are gone; the same `visar sample` makes them."
            )
        if len({("prompt" in line, "class" in line) for line in lines}) > 1:
            raise VisarError(f"{self.manifest} has lines with a prompt and lines with a class.")
        return lines

    @contextmanager
    def locked(self, rank: int, world: int = 1) -> Iterator[None]:
        """Hold the lock of a rank; rank 0 also checks that no rank of a larger job is still running.

        The kernel releases it when the process ends. Raises `VisarError` if another run has it.
        """
        with self._lock(rank):
            if rank == 0:
                for file in self.path.glob(".lock.*"):
                    if int(file.suffix[1:]) >= world:
                        with self._lock(int(file.suffix[1:])):
                            pass
            yield

    def _lock(self, rank: int) -> AbstractContextManager[None]:
        taken = f"Another run is at work in {self.path}; wait until it ends, or give another folder."
        return locked(self.path / f".lock.{rank}", taken)


class Journal:
    """Writes each image and then its line, and syncs each to the disk."""

    def __init__(self, folder: RunFolder, rank: int):
        self._folder = folder
        self._path = folder.path / f".journal.{rank}"
        self._mended = False

    def write(self, image: Image.Image, line: Line) -> None:
        """Write an image as its line's "file", then the line. Raises `VisarError` if that fails."""
        try:
            with replacing(self._folder.path / line["file"]) as temporary, open(temporary, "wb") as file:
                image.save(file, format="PNG")
                _to_disk(file)
            with open(self._path, "ab") as file:
                if not self._mended:  # a kill may have cut the last line short
                    file.truncate(self._path.read_bytes().rfind(b"\n") + 1)
                    self._mended = True
                file.write(json.dumps(line).encode() + b"\n")
                _to_disk(file)
        except (OSError, VisarError) as error:
            why = reason(error.__cause__ if isinstance(error.__cause__, OSError) else error)
            raise VisarError(f"Cannot write to {self._folder.path}: {why}.") from error


def is_whole(image: Path) -> bool:
    """Whether a PNG file is complete, by its first and last bytes."""
    try:
        with open(image, "rb") as file:
            if file.read(len(PNG_START)) != PNG_START:
                return False
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:
        return False


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _whole_lines(file: Path) -> Iterator[Line]:
    """The valid lines; images of damaged lines are sampled again."""
    for text in file.read_bytes().split(b"\n")[:-1]:
        with suppress(VisarError):
            yield dict(parse_json(text, ImageLine, f"A line of {file}"))


def _pairs(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Pairs of values to compare, by name; dicts entry by entry."""
    if isinstance(new, dict) and isinstance(old, dict):
        for key in new:
            yield from _pairs(key, old.get(key), new[key])
    else:
        yield name, old, new
