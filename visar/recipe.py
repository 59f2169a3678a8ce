"""How an image was made: what its PNG file says of it, and the command and the Python that make it again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from visar import __version__
from visar.errors import VisarError
from visar.texts import check_file

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngInfo

CHUNK = "visar"  # the text chunk of a PNG file, in JSON; "Description" has the prompts, for other programs
_CALLS = {"drafter": "load_drafter", "quantize": "quantize"}  # options of the command that are methods in Python
_SPECIAL = "\\'!"  # in $'...'; interactive shells may take ! for a line of their history
Value = str | int | float | bool


class Recipe(BaseModel):
    """One file: image number `image`, from 0, of a prompt or class, each pixel `scale` x `scale` times.

    Or a `grid`: all images up to that number of the prompt or class, and then of each of the `others`.

    `parameters` are those of the sampler that are not its defaults, `settings` those of `SamplingParams` that were
    given, the seed among them, `load` further options of the model (`--vq` and the like). `decoded` images were
    decoded together; None where that is not known, as in the demo.
    """

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    model: str
    prompt: str | None = None
    label: int | None = None
    sampler: str
    exactness: str
    parameters: dict[str, Value] = {}
    settings: dict[str, Value] = {}
    image: int = 0
    grid: bool = False
    others: list[str | int] = []
    scale: int = 1
    decoded: int | None = None
    dtype: str = "float32"
    load: list[tuple[str, Value]] = []
    version: str = __version__

    @property
    def conditions(self) -> list[str | int | None]:
        """All prompts or classes, one but for a grid."""
        return [self.label if self.prompt is None else self.prompt, *self.others]

    @property
    def title(self) -> str:
        return "; ".join(str(c) if isinstance(c, str) else f"class {c}" for c in self.conditions)

    @property
    def count(self) -> int:
        """The images that the command decodes together."""
        return len(self.conditions) * (self.image + 1)

    def command(self) -> str:
        """The command of a shell, whose last image is the one, or which writes the grid."""
        prompts = [c for c in self.conditions if isinstance(c, str)]
        last = ["--", *prompts] if any(p.startswith("-") for p in prompts) else []  # elsewhere that is an option
        words = ["visar", "generate", *([] if last else prompts)]
        for label in self.conditions:
            words += [] if isinstance(label, str) else ["--class", str(label)]
        words += _option("--model", self.model)
        for name, value in self.load:
            flag = f"--no-{name}" if value is False else f"--{name}"
            words += [flag] if isinstance(value, bool) else _option(flag, value)
        words += _option("--sampler", self.sampler)
        for name, value in self.parameters.items():
            words += ["--set", f"{name}={_plain(value)}"]
        for name, value in self.settings.items():
            flag = f"--{name.replace('_', '-')}"
            words += ([flag] if value else []) if isinstance(value, bool) else _option(flag, value)
        words += ["--dtype", self.dtype] + (["-n", str(self.image + 1)] if self.image else [])
        words += (["--grid"] if self.grid else []) + (["--scale", str(self.scale)] if self.scale > 1 else [])
        return " ".join(map(quoted, words + last))

    def note(self) -> str:
        """A sentence on why the command may make other pixels; "" where it makes the same."""
        if self.dtype == "float32" or self.settings.get("invariant") or self.decoded == self.count:
            return ""
        then = "an unknown number" if self.decoded is None else str(self.decoded)
        return (
            f"It may make another image: {self.dtype} rounds by how many are decoded together, {then} in this file and "
            f"{self.count} in the command."
        )

    def python(self) -> str:
        """A program that writes the same file."""
        sampler = repr(self.sampler)
        if self.parameters:
            sampler = f"get_sampler({sampler}, {_keywords(self.parameters)})"
        settings = self.settings | ({"num_images_per_prompt": self.image + 1} if self.image else {})
        load = [(name.replace("-", "_"), value) for name, value in self.load if name not in _CALLS]
        calls = [f"pipe.{_CALLS[name]}({value!r})" for name, value in self.load if name in _CALLS]
        one = self.conditions if self.others else self.conditions[0]
        image = "grid(out.images)" if self.grid else f"out.images[{self.image}]"
        scaled = [f"image = image.resize([side * {self.scale} for side in image.size], Image.Resampling.NEAREST)"]
        return "\n".join([
            "import torch", *(["from PIL import Image"] if self.scale > 1 else []), "", "import visar",
            *(["from visar.cli.preview import grid"] if self.grid else []),
            *(["from visar.samplers import get_sampler"] if self.parameters else []), "",
            f"pipe = visar.load({self.model!r}{''.join(f', {n}={v!r}' for n, v in load)})",
            f"pipe.to(dtype=torch.{self.dtype})",
            *calls,
            f"out = pipe({one!r}, sampler={sampler}"
            f"{''.join(f', {name}={value!r}' for name, value in settings.items())})",
            *([f"image = {image}", *scaled] if self.scale > 1 else []),
            f"{'image' if self.scale > 1 else image}.save({self.file_name!r})",
        ])  # fmt: skip

    @property
    def file_name(self) -> str:
        """By prompt, seed and sampler."""
        words = "".join(c if c.isalnum() and c.isascii() else "-" for c in self.title.lower())
        stem = "-".join(filter(None, words.split("-")))[:60] or "image"
        number = f"-{self.image + 1}" if self.image else ""
        return f"{stem}-seed{self.settings.get('seed', 0)}-{self.sampler.rpartition(':')[2]}{number}.png"

    def info(self) -> PngInfo:
        """The texts for Pillow's `save(..., pnginfo=)`."""
        from PIL.PngImagePlugin import PngInfo

        made = PngInfo()
        made.add_itxt("Description", self.title)
        made.add_text("Software", f"visar {self.version}")
        made.add_text(CHUNK, self.model_dump_json(exclude_none=True, ensure_ascii=True))
        return made

    @classmethod
    def of(cls, method: Any, place: str = "", **values: Any) -> Recipe:
        """The recipe for a sampler object; `place` is the FILE.py:NAME of one of the user's own.

        Parameters are those that a command can give: no others of the user's have a name there.
        """
        from visar.generation.stats import exactness_of
        from visar.samplers import SAMPLERS, values_of
        from visar.samplers.parameters import parameters_of

        spec = None if place else SAMPLERS.get(method.name)
        own = values_of(method)
        plain = {} if spec is None else spec.parameters()
        names = parameters_of(method) if spec is None else plain
        given = {n: own[n] for n in names if isinstance(own.get(n), Value) and own[n] != plain.get(n, object())}
        return cls(sampler=place or method.name, exactness=exactness_of(method), parameters=given, **values)

    @classmethod
    def read(cls, file: str | Path) -> Recipe:
        """That of a PNG file. Raises `VisarError` for a file that is no PNG of visar."""
        from visar.image_files import open_image

        path = Path(file)
        check_file(path)
        with open_image(path, path) as image:
            try:
                image.load()
            except Exception as error:  # Pillow's readers raise any kind for a damaged file
                raise VisarError(f"{file} is not an image that can be read.") from error
            text = image.info.get(CHUNK)
        if not isinstance(text, str):
            raise VisarError(f"{file} does not say how it was made: it is not a PNG of visar, or was saved again.")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise VisarError(f"{file} is damaged: what it says of its making cannot be read.") from error


def _option(flag: str, value: Value) -> list[str]:
    """A flag and its value, in one word if the value would be taken for an option."""
    text = _plain(value)
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def _plain(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _keywords(values: dict[str, Value]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def printable(text: str) -> str:
    """A text of a file, which a terminal is to show and not to obey."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def quoted(word: str) -> str:
    """A word of bash, zsh and ksh that shows what prints, and in octal what does not, as in $'a\\302\\240cat'."""
    if word.isprintable():
        return shlex.quote(word)
    return f"$'{''.join(c if c.isprintable() and c not in _SPECIAL else _octal(c) for c in word)}'"


def _octal(c: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in c.encode(errors="surrogateescape"))
