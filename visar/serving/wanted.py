"""What a client wants and what it is told, in plain values: they can go to another process and back.

The HTTP side knows nothing else of who makes the images: an engine in this process (`visar.serving.replica`), or
something that asks one elsewhere.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from visar.errors import VisarError
from visar.params import SamplingParams


class Broken(VisarError):
    """An image that could not be made, through no fault of the client."""


class Refusal(VisarError):
    """A value that cannot be, of the field `param`."""

    def __init__(self, param: str, message: object):
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[type[Refusal], tuple[str, str]]:
        return Refusal, (self.param, str(self))


@dataclass(frozen=True)
class SamplerCard:
    """What clients may know of a sampler."""

    exactness: str  # "exact", "relaxed", or a phrase if it is neither
    window: int
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class ModelCard:
    """What clients may know of a model, and all that is needed to check a request.

    `condition` is "prompt" or "class", `guided` whether there is guidance, `tokens` the kind of its tokens, `length`
    their number in an image, `scan` how it samples them (`visar.families.base.Family`). The first of `samplers` is the
    default.
    """

    name: str
    condition: str
    classes: int
    width: int
    height: int
    tokens: str
    length: int
    dtype: str
    samplers: Mapping[str, SamplerCard]
    guided: bool = True
    scan: str = "raster"

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def sampler(self) -> str:
        """The default."""
        return next(iter(self.samplers))


@dataclass(frozen=True)
class Wanted:
    """Images of one prompt or class id, those with the indices `images`; `params` have a seed.

    `form` is "png", "webp" or "jpeg"; of each image at work there are `previews` at most. After `seconds` it is too
    late.
    """

    model: str
    sampler: str
    condition: str | int
    params: SamplingParams
    images: tuple[int, ...] = (0,)
    form: str = "png"
    previews: int = 0
    seconds: float = 600


class Accepted(NamedTuple):
    """The images will be made with these settings; `notes` are sentences for the client."""

    params: SamplingParams
    notes: tuple[str, ...]


class Preview(NamedTuple):
    """A file of an image at work, grey where it is not sampled yet."""

    image: int
    file: bytes


class Made(NamedTuple):
    """The file of an image, which waited `waited` of its `seconds` for a row."""

    image: int
    file: bytes
    passes: int
    nfe: int
    waited: float
    seconds: float


Told = Accepted | Preview | Made


class Studio(Protocol):
    """Who makes the images. All its methods are called in one event loop."""

    @property
    def cards(self) -> Mapping[str, ModelCard]:
        """The models by name; the first is the default."""

    def images(self, wanted: Wanted) -> AsyncGenerator[Told, None]:
        """`Accepted`, then for each image its previews and `Made`; closing the iterator ends what is not done.

        Raises `VisarError` for what the model does not take, `Busy`, `Closed`, `Late`, and `Broken` where the model
        fails; other errors are mistakes in visar.
        """

    @property
    def retry_after(self) -> int:
        """Seconds after which one that was refused may ask again."""

    @property
    def problem(self) -> str:
        """Why it makes no images, in a sentence; "" while it is well."""

    @property
    def ready(self) -> bool:
        """Whether it would take a request now."""
