"""What a family of models brings: how it is found and loaded, its conditions, its sessions, its pixels, its defaults.

A family object is a loaded model. Everything above (generation, pipelines, command line, demo, evaluation) knows this
interface alone; everything peculiar to one architecture stands behind it. `docs/own-family.md` has one in 60 lines.
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

from visar.errors import VisarError
from visar.host import has_bfloat16
from visar.params import CONTINUOUS, DISCRETE, SamplingParams

if TYPE_CHECKING:
    from visar.engine.graphs import RowGraphs
    from visar.engine.guidance import Guidance
    from visar.engine.masked_session import MaskedSession
    from visar.engine.session import Session
    from visar.families.layout import Layout
    from visar.families.source import Source

Encoded = tuple[Tensor, ...]  # of conditions: tensors with one row for each, as `session` takes them


class Family(ABC):
    """A loaded model. `components` are its parts by the names of their folders, the first being the one that decodes.

    `condition` is "prompt" or "class", `classes` how many of these there are. `settings` are what a saved folder keeps
    beside the components; `defaults` are the settings of sampling where a caller gives none.
    """

    name: ClassVar[str]  # in the registry
    tokens: ClassVar[str] = DISCRETE  # or CONTINUOUS
    required: ClassVar[frozenset[str]] = frozenset()  # names of components, and
    optional: ClassVar[frozenset[str]] = frozenset()  # those that a model may have
    setting_names: ClassVar[tuple[str, ...]] = ()

    components: dict[str, Any]
    layout: Layout
    condition: str = "prompt"
    classes: int = 0
    defaults: SamplingParams
    settings: dict[str, Any]
    forced: Tensor | None = None  # [N], long: tokens that every image has, -1 elsewhere
    allowed: Tensor | None = None  # [V], bool: tokens that the other positions may take

    # Finding and loading

    @classmethod
    @abstractmethod
    def recognises(cls, source: Source) -> bool:
        """Whether the model at `source` is of this family; looks at names and configurations, never at weights."""

    @classmethod
    @abstractmethod
    def load(cls, source: Source) -> Self:
        """The model at a `source` that was recognised. Raises `VisarError` for what is missing, damaged or wrong."""

    @classmethod
    def of(cls, components: Mapping[str, Any], settings: Mapping[str, Any]) -> Self:
        """The model made of loaded components and settings, as `TextToImagePipeline(**components)` gives them."""
        return cls(**components, **settings)

    # Conditions

    @abstractmethod
    def encode(self, conditions: Sequence[Any]) -> Encoded:
        """Tensors of the prompts or class ids. Raises `VisarError` for one that the model cannot take."""

    def check_conditions(self, conditions: Sequence[Any]) -> None:
        """Raise `VisarError` for conditions that this model cannot take, before anything is computed."""
        if not conditions:
            raise VisarError(f"No {self.condition} was given.")
        if self.condition == "prompt":
            if any(not isinstance(c, str) or not c.strip() for c in conditions):
                raise VisarError("The prompt is empty; give at least one word.")
            return
        for label in conditions:
            if isinstance(label, str):
                raise VisarError(f"This model takes class ids, 0 to {self.classes - 1}, not the prompt {label!r}.")
            if not 0 <= label < self.classes:
                raise VisarError(f"Class {label} does not exist; this model knows 0 to {self.classes - 1}.")

    def notes(self, conditions: Sequence[Any]) -> list[str]:
        """Sentences about what of the conditions was not in training; none where that is not known."""
        found = getattr(self.components.get("text_encoder"), "notes", None)
        return found(conditions) if found else []

    # Pixels

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], fp32, for tokens [B, N], of continuous models [B, N, d]."""

    @property
    @abstractmethod
    def pixels(self) -> tuple[int, int]:
        """Height and width of an image."""

    def preview(self, tokens: Tensor) -> Tensor:
        """One colour for each cell, [B, 3, rows, columns] in [0, 1]; a family may have a cheaper way than `decode`."""
        return F.adaptive_avg_pool2d(self.decode(tokens), (self.layout.rows, self.layout.columns))

    # The model at work

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
        """What decoding is fastest in on the device that the model is on; the command line's default."""
        return torch.bfloat16 if self.device.type != "cpu" or has_bfloat16() else torch.float32

    @property
    def weights(self) -> str:
        """How the weights are stored: "native", or what `quantize` made them."""
        return "native"

    @property
    def bytes_per_pass(self) -> int:
        """Bytes of weights that a pass reads."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def bytes_per_image(self, window: int, guided: bool) -> int:
        """Bytes that one image takes while it is decoded, besides the weights; 0 where that is not known."""
        return 0

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert all components, as `torch.nn.Module.to` does."""
        for part in self.components.values():
            if isinstance(part, nn.Module):
                part.to(*args, **kwargs)
        return self

    @property
    def drafting(self) -> Any:
        """What drafters ask of their target: a `visar.drafters.base.DrafterTarget`; None where none can be attached."""
        return None

    def quantize(self, weights: str) -> None:
        """Round the weights to 8 bits; "native" leaves them. Raises `VisarError` where a family cannot."""
        if weights != "native":
            raise VisarError(f"Weights of the family {self.name!r} cannot be rounded to 8 bits.")

    def check_saving(self) -> None:  # noqa: B027 (most can be saved)
        """Raise `VisarError` where the model cannot be saved as it is."""

    def replace(self, name: str, component: Any) -> None:
        """Put another component in the place of one."""
        self.components[name] = component

    def copy(self) -> Self:
        """The same components under settings of their own."""
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
        """A session for passes of `window` tokens; with `aux_layers`, one that keeps hidden states for a drafter."""

    @property
    def codebook(self) -> Tensor | None:
        """[V, D], for samplers that ask which tokens look alike."""
        return None


class ContinuousFamily(Family):
    """A family whose tokens are vectors, sampled in an order of their own."""

    tokens: ClassVar[str] = CONTINUOUS
    token_dim: int

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
        `draft` model, a session that has one of it to draft with."""

    def bytes_read(self, session: Any) -> int:
        """Bytes of weights that a finished session read."""
        return 0
