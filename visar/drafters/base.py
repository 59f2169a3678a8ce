"""What a kind of drafter is, and what it asks of the model that it drafts for.

A kind is one file in this folder: the network, the drafter at work on a session, the training loss, and a `DraftKind`
that `register_drafter` gives a name. What only a model's family knows, it asks of a `DrafterTarget`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from visar.drafters.acceptance import head_of
from visar.engine.decoder import Decoder
from visar.engine.drafter import Drafter, SessionDrafter, Timed
from visar.engine.feature_session import FeatureSession
from visar.engine.guidance import Guidance
from visar.engine.memory import streamed_bytes
from visar.engine.session import Session
from visar.errors import VisarError, unknown

if TYPE_CHECKING:
    from visar.drafters.loss import DraftLoss


class DrafterLoading(Protocol):
    """What loading asks of a model's family, about smaller models of its own kind."""

    masked: ClassVar[bool]  # whether it predicts masked sets of continuous tokens, and is no `Decoder`
    smaller_kind: ClassVar[str]  # the kind of drafter that a smaller model is
    network: ClassVar[Any]  # its class
    folder: ClassVar[str]  # its folder in that of a pipeline

    def read(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a published file. Raises `VisarError` where there are none."""
        ...

    def of_state(self, state: Mapping[str, Tensor], path: str | Path) -> Any:
        """The smaller model of such tensors. Raises `VisarError` where they are none."""
        ...

    def check(self, model: Any, path: str | Path) -> None:
        """Raise `VisarError` for a smaller model of other tokens or conditions than the target's."""
        ...


class DrafterTarget(DrafterLoading, Protocol):
    """A `Decoder` to draft for, which is a module, with its image size."""

    @property
    def model(self) -> Any: ...

    layered: ClassVar[bool]  # whether its layers are visar's, so that drafters can be made of them

    def given(self, encoded: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Conditions as `embedded` takes them, of those that the family encoded, and their mask.

        The mask is False where slots are padding: [B, T], or [B, batches, T] where batches of guidance differ in it.
        """
        ...

    def embedded(self, model: Any, condition: Tensor, tokens: Tensor, guided: bool) -> Tensor:
        """Inputs [rows, T + N - 1, dim] of a model: the condition, then all `tokens` [B, N] but the last.

        The B conditional rows come first; where `guided`, as many unconditional ones follow.
        """
        ...

    def table(self, model: Any, prefix: int) -> Tensor:
        """The rotary rows of all slots of a model, of which `prefix` are the condition's: [T + N, head_dim / 2, 2]."""
        ...

    def smaller(self, layers: int) -> Any:
        """An untrained model for the same tokens and conditions, half as wide, of `layers` layers."""
        ...

    def with_layers(self, layers: Sequence[nn.Module], norm: nn.Module) -> Any:
        """A model of these layers and this norm that shares all else with the target."""
        ...

    def session(self, model: Any, encoded: Sequence[Tensor], window: int, guidance: Guidance) -> Session:
        """A session of a smaller model, for conditions as the target's own sessions take them."""
        ...


class DraftKind(ABC):
    """A kind of drafter, known to samplers and in `visar train drafter --kind` by its `name`."""

    network: ClassVar[Any] = None  # the class of its models; None: a smaller model, which the family knows
    loss: ClassVar[type[DraftLoss[Any]] | None] = None
    masked: ClassVar[bool] = False  # whether it is for masked models

    def __init__(self, name: str):
        self.name = name

    def published(self, state: Mapping[str, Tensor], target: DrafterTarget, path: str | Path) -> Any | None:
        """A drafter of a released file's tensors; None where the file is of another kind. Raises `VisarError`."""
        return None

    @abstractmethod
    def check(self, model: Any, target: Any, path: str | Path) -> None:
        """Raise `VisarError` for a drafter that cannot draft for the target."""

    def default_layers(self, of: int) -> int | None:
        """How many layers of a target of `of` layers it has, if nobody says; None where there is nothing to say."""
        return None

    def checked_layers(self, layers: int | None, of: int) -> int:
        """The number of layers, 0 where there is none to choose; a `VisarError` for one that cannot be."""
        default = self.default_layers(of)
        if layers is None:
            return default or 0
        if default is None:
            having = ", ".join(n for n, kind in DRAFTERS.items() if kind.default_layers(of) is not None)
            raise VisarError(f"A drafter of the kind {self.name!r} has no layers to choose; these have: {having}.")
        if not 1 <= layers <= of:
            raise VisarError(f"The layers must be 1 to {of}, not {layers}.")
        return layers

    def check_target(self, target: DrafterTarget) -> None:
        """Raise `VisarError` for a target of whose layers this kind cannot be made."""
        if not target.layered and self.default_layers(1) is not None:
            others = ", ".join(n for n, kind in DRAFTERS.items() if not kind.masked and kind.default_layers(1) is None)
            raise VisarError(f"A model of transformers takes no drafter of the kind {self.name!r}; it takes {others}.")

    def new(self, target: DrafterTarget, depth: int, layers: int) -> Any:
        """An untrained drafter for a target."""
        raise VisarError(f"A drafter of the kind {self.name!r} cannot be trained here.")

    def search(self, loss: DraftLoss[Any], batch: Sequence[Tensor], layers: int) -> Any | None:
        """The drafter that a batch of images shows to be best, of a kind that has no weights to train; else None."""
        return None

    def aux_layers(self, model: Any) -> tuple[int, ...] | None:
        """The layers whose hidden states it reads next to the last ones; None where it reads no hidden states."""
        return None

    def drafter(self, session: FeatureSession, model: Any, depth: int) -> Drafter | None:
        """The drafter at work, `depth` tokens deep, on the session's hidden states; None for a `decoder`."""
        return None

    def decoder(self, model: Any, target: DrafterTarget) -> Any:
        """The `Decoder` that drafts in a session of its own, where there is no other `drafter`."""
        return model

    def attach(
        self,
        session: FeatureSession,
        model: Any,
        target: DrafterTarget,
        depth: int,
        window: int,
        encoded: Sequence[Tensor],
    ) -> Drafter:
        """A drafter at work for a session of the `encoded` conditions, its passes timed.

        It drafts `depth` tokens deep; the target tests `window` tokens in a pass.
        """
        model.to(session.device, session.dtype)
        if (drafter := self.drafter(session, model, depth)) is None:
            decoder = self.decoder(model, target)
            # The root of the drafter's own session is one node before that of the tree.
            inner = target.session(decoder, encoded, window + 1, session.guidance)
            drafter = SessionDrafter(inner, streamed_bytes(decoder.layers, decoder.norm, decoder.output))
        if (head := head_of(model)) is not None:
            drafter.head = head.to(session.device)
        return Timed(drafter, session.device)


DRAFTERS: dict[str, DraftKind] = {}
K = TypeVar("K", bound=type[DraftKind])


def register_drafter(*names: str) -> Callable[[K], K]:
    """Make a `DraftKind` known by its name, or by several names that it tells apart."""

    def register(kind: K) -> K:
        DRAFTERS.update({name: kind(name) for name in names})
        return kind

    return register


def drafter_kinds(masked: bool = False) -> list[str]:
    """The names of the kinds for decoders, or for masked models."""
    return [name for name, kind in DRAFTERS.items() if kind.masked == masked]


def drafter_kind(name: str) -> DraftKind:
    """The kind for decoders of this name. Raises `VisarError` where there is none."""
    if name not in (names := drafter_kinds()):
        raise unknown("drafter", name, names)
    return DRAFTERS[name]


def fingerprint(target: Decoder) -> str:
    """A mark of a target's weights that is the same in every dtype: a hash of the signs of its output head."""
    signs = torch.signbit(target.output.weight.detach()).cpu().numpy()
    return hashlib.sha256(signs.tobytes()).hexdigest()[:16]


def check_fit(model: Any, target: DrafterTarget, path: str | Path, layers: Sequence[int] = ()) -> None:
    """Raise `VisarError` for a network of other sizes than its target's, or trained for another one.

    `layers` are those of the target that it uses.
    """
    own, its = model.config, target.model.config
    width, heads = getattr(own, "dim", its.dim), getattr(own, "num_heads", None)
    if width != its.dim:
        raise VisarError(f"The drafter {path} is {width} wide, the target {its.dim}: it is another model's.")
    if heads is not None and width // heads != target.model.head_dim:
        raise VisarError(f"The drafter {path} has heads of {width // heads}, the target of {target.model.head_dim}.")
    if not all(0 <= i < its.num_layers for i in layers):
        raise VisarError(f"The drafter {path} uses layers {layers} of a target that has {its.num_layers}.")
    if own.target and own.target != fingerprint(target.model):
        raise VisarError(f"The drafter {path} was trained for another target; see `visar train drafter`.")
