"""The interface of a model family: how it is found and loaded, its conditions, sessions, pixels and defaults.

A family object is a loaded model. Generation, pipelines, command line, demo and evaluation know only this interface.
`docs/own-family.md` has a family in 60 lines.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from visar.engine.memory import streamed_bytes
from visar.errors import VisarError
from visar.families.weights import load_part
from visar.families.wrapped import check_layers
from visar.host import has_bfloat16
from visar.params import CONTINUOUS, DISCRETE, SamplingParams
from visar.reading import short
from visar.text_encoders import load_text_encoder
from visar.texts import check_prompt

if TYPE_CHECKING:
    from visar.engine.graphs import RowGraphs
    from visar.engine.guidance import Guidance
    from visar.engine.layout import Layout
    from visar.engine.masked_session import MaskedSession
    from visar.engine.session import Session
    from visar.families.source import Source

# Tensors with one row for each condition, as `session` takes them; in any order (`scan`) the last is the cells [B, N].
Encoded = tuple[Tensor, ...]


class Family(ABC):
    """A loaded model. `components` are its parts by the names of their folders; the first one decodes.

    `condition` is "prompt" or "class", `classes` the number of classes. `settings` are saved with the components;
    `defaults` are the settings of sampling where a caller gives none.
    """

    name: ClassVar[str]  # in the registry
    tokens: ClassVar[str] = DISCRETE  # or CONTINUOUS
    scan: str = "raster"  # in which tokens are sampled; a sampler is for one order (`visar.samplers.registry.SCANS`)
    sizes: ClassVar[bool] = False  # whether a model makes images of any size
    guided: ClassVar[bool] = True  # whether it has an unconditional batch
    required: ClassVar[frozenset[str]] = frozenset()  # names of components
    optional: ClassVar[frozenset[str]] = frozenset()  # components that a model may have
    token_shape: tuple[int, ...] = ()  # of one token: that of a number, or of continuous tokens [d]
    setting_names: ClassVar[tuple[str, ...]] = ()

    components: dict[str, Any]
    layout: Layout
    condition: str = "prompt"
    classes: int = 0
    defaults: SamplingParams
    settings: dict[str, Any]
    forced: Tensor | None = None  # [N], long: tokens that every image has; -1 elsewhere
    allowed: Tensor | None = None  # [V], bool: tokens that the other positions may take

    # Finding and loading

    @classmethod
    @abstractmethod
    def recognises(cls, source: Source) -> bool:
        """Whether the model at `source` is of this family; reads names and configurations, never weights."""

    @classmethod
    def scan_at(cls, source: Source) -> str:
        """The `scan` of the model at a `source` that was recognised, without reading its weights."""
        return cls.scan

    @classmethod
    @abstractmethod
    def load(cls, source: Source) -> Self:
        """The model at a `source` that was recognised. Raises `VisarError` for missing, damaged or wrong files."""

    @classmethod
    def of(cls, components: Mapping[str, Any], settings: Mapping[str, Any]) -> Self:
        """The model of loaded components and settings, as `TextToImagePipeline(**components)` gives them."""
        return cls(**components, **settings)

    @classmethod
    def of_folder(cls, source: Source, classes: Mapping[str, Any]) -> Self:
        """The model of a saved folder: components of these `classes` by name, and a text encoder if it has one."""
        parts: dict[str, Any] = dict(source.given)
        for part, kind in classes.items():
            if part not in parts:
                parts[part] = load_part(kind, source.component_folder(part), repr(part))
        if "text_encoder" in source.index and "text_encoder" not in parts:
            kind = source.component_class("text_encoder")
            folders = source.component_folder("text_encoder"), source.own_folder("text_encoder")
            parts["text_encoder"] = load_text_encoder(kind, *folders)
        return cls(**parts, **source.settings(cls, cls.required | cls.optional, cls.setting_names))

    # Conditions

    @abstractmethod
    def encode(self, conditions: Sequence[Any]) -> Encoded:
        """Tensors of the prompts or class ids. Raises `VisarError` for one that the model cannot take."""

    def widened(self, encoded: Encoded) -> Encoded:
        """Conditions in the shapes that those of any other have, where rows are taken in turns."""
        return encoded

    def check_conditions(self, conditions: Sequence[Any]) -> None:
        """Raise `VisarError` for conditions that this model cannot take."""
        if not conditions:
            raise VisarError(f"No {self.condition} was given.")
        if self.condition == "prompt":
            for text in conditions:
                if not isinstance(text, str):
                    raise VisarError(f"A prompt is a text, not {short(text)}.")
                if not text.strip():
                    raise VisarError("The prompt is empty; give at least one word.")
                check_prompt(text)
            return
        for label in conditions:
            if isinstance(label, str):
                raise VisarError(f"This model takes class ids, 0 to {self.classes - 1}, not the prompt {label!r}.")
            if not 0 <= label < self.classes:
                raise VisarError(f"Class {short(label)} does not exist; this model knows 0 to {self.classes - 1}.")

    def check_in_rows(self, conditions: Sequence[Any]) -> None:
        """`check_conditions`, for rows that are taken in turns."""
        self.check_conditions(conditions)

    def notes(self, conditions: Sequence[Any]) -> list[str]:
        """Sentences about what of the conditions was not in training; none where that is not known."""
        found = getattr(self.components.get("text_encoder"), "notes", None)
        return found(conditions) if found else []

    def left_out(self, conditions: Sequence[Any]) -> list[str]:
        """Sentences about what of the conditions is not used. Raises `VisarError` where nothing of one is left."""
        found = getattr(self.components.get("text_encoder"), "left_out", None)
        return found(conditions) if found else []

    # Pixels

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], fp32, for tokens [B, N], of continuous models [B, N, d]."""

    def decode_for(self, conditions: Sequence[Any], tokens: Tensor) -> Tensor:
        """`decode`, for decoders that take the prompts of the images too."""
        return self.decode(tokens)

    def check_decoding(self) -> None:  # noqa: B027 (most have a decoder)
        """Raise `VisarError` if the model has no decoder of pixels."""

    @property
    @abstractmethod
    def pixels(self) -> tuple[int, int]:
        """Height and width of an image."""

    def sized(self, height: int | None = None, width: int | None = None) -> Self:
        """The model for images of another size in pixels, by default its own; it shares the components.

        Raises `VisarError` for a size that the model does not make.
        """
        for what, value, own in (("height", height, self.pixels[0]), ("width", width, self.pixels[1])):
            if value is not None and value != own:
                raise VisarError(f"{what} must be {own}: this model makes images of one size.")
        return self

    def preview(self, tokens: Tensor) -> Tensor:
        """One colour for each cell, [B, 3, rows, columns] in [0, 1]. Families may override it with a faster way."""
        return F.adaptive_avg_pool2d(self.decode(tokens), (self.layout.rows, self.layout.columns))

    # Decoding

    @property
    def model(self) -> Any:
        """The component that decodes."""
        return next(iter(self.components.values()))

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.model.dtype
        return found

    @property
    def fastest_dtype(self) -> torch.dtype:
        """The dtype in which decoding is fastest on the model's device; the default of the command line."""
        return torch.bfloat16 if self.device.type != "cpu" or has_bfloat16() else torch.float32

    @property
    def weights(self) -> str:
        """The storage of the weights: "native", "int8" or "fp8"."""
        return "native"

    @property
    def bytes_per_pass(self) -> int:
        """Bytes of weights that a pass reads. Families override it where a pass does not run all of the model."""
        return streamed_bytes(self.model)

    def bytes_per_image(self, window: int, guided: bool) -> int:
        """Bytes of memory that decoding one image needs besides the weights; 0 if not known."""
        return 0

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert all components, as `torch.nn.Module.to` does."""
        for part in self.components.values():
            if isinstance(part, nn.Module):
                part.to(*args, **kwargs)
        return self

    @property
    def drafting(self) -> Any:
        """The `visar.drafters.base.DrafterTarget` of this model; None if it takes no drafters."""
        return None

    def quantize(self, weights: str) -> None:
        """Round the weights to 8 bits; "native" leaves them. Raises `VisarError` if the family does not support it."""
        if weights != "native":
            raise VisarError(f"Weights of the family {self.name!r} cannot be rounded to 8 bits.")

    @classmethod
    def wraps(cls, model: Any) -> bool:
        """Whether `visar.accelerate` makes a model of this family of another library's loaded `model`."""
        return False

    @classmethod
    def around(cls, model: Any, processor: Any) -> Self:
        """The model of another library's loaded `model`, which stays as it is, and the processor of its prompts.

        Called for what `wraps` takes. Raises `VisarError` if the family takes none.
        """
        raise VisarError(f"The family {cls.name!r} is loaded by name, and not around a {type(model).__name__}.")

    def in_place_of(self, model: Any, pipeline: Any) -> Any:
        """What `visar.accelerate` gives for the loaded `model`: visar's `pipeline`, or what takes the model's place."""
        return pipeline

    def check_layers(self) -> None:
        """Raise `VisarError` for layers of the model that decoding cannot run."""
        check_layers(self.model)

    def check_saving(self) -> None:  # noqa: B027 (most can be saved)
        """Raise `VisarError` if the model cannot be saved."""

    def replace(self, name: str, component: Any) -> None:
        """Replace the component `name`; checked, with all that follows from it, as at first. Raises `VisarError`."""
        made = self.of(self.components | {name: component}, self.settings)
        vars(self).clear()
        vars(self).update(vars(made))

    def copy(self) -> Self:
        """A copy that shares the components."""
        other = copy.copy(self)
        other.components = dict(self.components)
        return other


class DiscreteFamily(Family):
    """A family whose tokens are ids of a vocabulary."""

    tokens: ClassVar[str] = DISCRETE

    @abstractmethod
    def session(
        self, encoded: Encoded, *, window: int, guidance: Guidance, aux_layers: Collection[int] | None = None
    ) -> Session:
        """A session for passes of `window` tokens; with `aux_layers`, one that stores hidden states for a drafter."""

    @property
    def codebook(self) -> Tensor | None:
        """[V, D], the codes as the tokenizer compares them, of length 1 or any, for samplers that compare tokens."""
        return None


class ContinuousFamily(Family):
    """A family whose tokens are vectors, sampled in any order."""

    tokens: ClassVar[str] = CONTINUOUS
    token_dim: int

    @property
    def token_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.token_dim,)

    @abstractmethod
    def session(
        self,
        encoded: Encoded,
        order: Tensor,
        *,
        scale: float,
        schedule: str,
        given: Tensor | None = None,
        graphs: RowGraphs | None = None,
        draft: Any = None,
    ) -> MaskedSession:
        """A session that samples in the `order` [B, N], of which the first tokens may be `given` [B, m, d]; with a
        `draft` model, its `draft` is a session of that."""

    def bytes_read(self, session: Any) -> int:
        """Bytes of weights that a finished session has read."""
        return 0
