"""The base of families whose models are transformers' own: loading, prompts of ids, sessions and memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from visar.dtypes import checked_dtype
from visar.engine.guidance import Guidance
from visar.engine.memory import COPIES
from visar.engine.quantization import quantize_once, weights_of
from visar.errors import VisarError
from visar.families.base import DiscreteFamily, Encoded
from visar.families.hf.configured import configured
from visar.families.hf.decoder import ImageDecoder
from visar.families.hf.drafting import TransformersTarget
from visar.families.hf.loading import load_model, load_processor
from visar.families.hf.session import TransformersSession
from visar.families.hf.stack import Stack
from visar.families.hf.versions import check_version
from visar.families.source import Source
from visar.families.wrapped import check_offloaded, check_same_dtype
from visar.kernels.invariant import is_invariant
from visar.params import SamplingParams

STEP = 64  # prompts are padded to a multiple of this, so that calls share sessions and graphs
SPECIAL = "The prompt holds, as text, a token of the model's that stands for an image; leave it out."
ROOM = 512  # slots for prompts where rows are taken in turns, unless the model has fewer


class TransformersFamily(DiscreteFamily):
    """A loaded `model` of transformers with the `processor` of its prompts, a processor or a tokenizer.

    A subclass gives `name`, the `architecture` (the class in transformers) and its `model_type` in `config.json`;
    `made` sets `decoder`, `layout`, `defaults` and, if there are any, `forced` and `allowed`; `prompt_ids` and `decode`
    are the two ends. The caller's model is used where it is, and is not changed.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]

    decoder: ImageDecoder
    as_configured = False  # whether the model's `generation_config` is about images, and goes before `defaults`
    has_vocabulary_map = False  # whether its configuration says which tokens are codes of images

    def __init__(self, model: Any, processor: Any):
        check_version()
        self.processor = processor
        self.components, self.settings = {"model": model}, {}
        self.made()

    @abstractmethod
    def made(self) -> None:
        """Set what follows from the model and its processor. Raises `VisarError` where a part of them is missing."""

    @abstractmethod
    def prompt_ids(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of a prompt, and those of the unconditional batch; none where the model has no guidance."""

    @property
    def defaults(self) -> SamplingParams:  # type: ignore[override]
        if not self.as_configured:
            return self._defaults
        return configured(self.model.generation_config, self._defaults, self.decoder.vocab, self.guided)

    @defaults.setter
    def defaults(self, own: SamplingParams) -> None:
        self._defaults = own

    @property
    def tokenizer(self) -> Any:
        """Raises `VisarError` for a processor without one."""
        found = getattr(self.processor, "tokenizer", self.processor)
        if not hasattr(found, "convert_tokens_to_ids"):
            raise VisarError(f"A processor or a tokenizer reads prompts, not a {type(found).__name__}.")
        return found

    # Finding and loading

    @classmethod
    def recognises(cls, source: Source) -> bool:
        own = source.folder is not None and source.config.get("model_type") == cls.model_type
        return own or bool(cls.foreign(source))

    @classmethod
    def foreign(cls, source: Source) -> str:
        """What to say of weights in a layout of this family that is not read, after their name; "" for all others."""
        return ""

    @classmethod
    def check_layout(cls, source: Source) -> None:
        """Raise `VisarError` for a layout that is not read."""
        if said := cls.foreign(source):
            raise VisarError(f"{source.name} {said}")
        if cls.has_vocabulary_map and not isinstance(source.config.get("vocabulary_map"), dict):
            raise VisarError(f"{source.name}/config.json has no vocabulary_map, so no token of it is a code of images.")

    @classmethod
    def load(cls, source: Source) -> Self:
        cls.check_layout(source)
        assert source.folder is not None
        check_version()
        return cls(load_model(cls.architecture, source.folder), load_processor(source.folder))

    @classmethod
    def wraps(cls, model: Any) -> bool:
        return type(model).__name__ == cls.architecture

    @classmethod
    def around(cls, model: Any, processor: Any) -> Self:
        cls.check_processor(model, processor)
        return cls(model, processor)

    @staticmethod
    def check_processor(model: Any, processor: Any) -> None:
        """Raise `VisarError` if none was given, or what cannot be one."""
        if processor is None:
            raise VisarError(f"Give the processor of this {type(model).__name__} too, as accelerate(model, processor).")
        if isinstance(processor, nn.Module) or not callable(processor):
            raise VisarError(f"A processor or a tokenizer reads prompts, not a {type(processor).__name__}.")

    def replace(self, name: str, component: Any) -> None:
        made = type(self)(component, self.processor)
        vars(self).clear()
        vars(self).update(vars(made))

    def check_saving(self) -> None:
        raise VisarError("A model of transformers is saved by its own save_pretrained, and its processor by its.")

    def check_layers(self) -> None:
        """Adapters (PEFT) and hooks of layers work: visar calls the layers as transformers does."""
        check_offloaded(self.model)
        checked_dtype("The dtype of the model", self.dtype)
        backbone = self.decoder.backbone
        if Stack.of(backbone) is not None:  # the `forward` of others may convert
            table = backbone.get_input_embeddings()
            check_same_dtype("The model", table, backbone.layers, backbone.norm, *self.decoder.ends)

    # Conditions

    @property
    def room(self) -> int:
        """The most ids of a prompt."""
        return self.decoder.context - self.layout.length

    def encode(self, conditions: Sequence[Any]) -> Encoded:
        """Ids [B, T], padded on the right, and their lengths [B]; with guidance the unconditional ones too."""
        super().check_conditions(conditions)
        pairs = [self.prompt_ids(text) for text in conditions]
        kinds = [ids for ids in zip(*pairs, strict=True) if all(ids)]
        longest = max(len(ids) for kind in kinds for ids in kind)
        last, known = max(max(ids) for kind in kinds for ids in kind), self.decoder.known
        if last >= known:
            raise VisarError(
                f"The tokenizer gives the prompt ids up to {last}, and this model knows those below {known}: it is "
                "another model's, or has tokens that the model was not resized for."
            )
        if longest > self.room:
            raise VisarError(
                f"The prompt has {longest} tokens; this model takes at most {self.room} next to the "
                f"{self.layout.length} of an image."
            )
        width = min(-(-longest // STEP) * STEP, self.room)
        return tuple(part for kind in kinds for part in padded(kind, width))

    def check_conditions(self, conditions: Sequence[Any]) -> None:
        self.encode(conditions)

    def check_in_rows(self, conditions: Sequence[Any]) -> None:
        self.widened(self.encode(conditions))

    def widened(self, encoded: Encoded) -> Encoded:
        """Padded to one width, which is that of all prompts up to it. Raises `VisarError` for a longer one."""
        room = min(ROOM, self.room)
        if (width := max(part.shape[1] for part in encoded[::2])) > room:
            raise VisarError(
                f"A prompt of over {room} tokens (padded: {width}) is decoded in a batch only: rows that are taken in "
                f"turns have room for {room}."
            )
        return tuple(F.pad(part, (0, room - part.shape[1])) if part.ndim == 2 else part for part in encoded)

    # Decoding

    def session(
        self, encoded: Encoded, *, window: int, guidance: Guidance, aux_layers: Collection[int] | None = None
    ) -> TransformersSession:
        return TransformersSession(
            self.decoder, *encoded, length=self.layout.length, window=window, guidance=guidance, aux_layers=aux_layers
        )

    @property
    def drafting(self) -> TransformersTarget:
        return TransformersTarget(self.decoder, self.layout.length)

    @property
    def weights(self) -> str:
        return weights_of(self.decoder.backbone)

    def quantize(self, weights: str) -> None:
        """The layers of the caller's model are rounded, which from then on is not saved."""
        backbone = self.decoder.backbone
        quantize_once(backbone, weights)
        if weights != "native":
            self.model.save_pretrained = backbone.save_pretrained

    @property
    def bytes_per_pass(self) -> int:
        return self.decoder.bytes_per_pass

    def bytes_per_image(self, window: int, guided: bool) -> int:
        d = self.decoder
        number = (8 if is_invariant() else 4) if self.device.type == "cpu" else self.dtype.itemsize
        slots = min(ROOM, self.room) + self.layout.length + window
        cached = 2 * d.layers * d.heads * d.head_dim * slots * number
        return (2 if guided else 1) * cached + COPIES * window * d.vocab * 4


def padded(ids: Sequence[Sequence[int]], width: int) -> tuple[Tensor, Tensor]:
    """Ids [B, width], padded on the right with ids that nothing attends to, and their lengths [B]."""
    out = torch.zeros(len(ids), width, dtype=torch.long)
    for row, own in zip(out, ids, strict=True):
        row[: len(own)] = torch.as_tensor(own)
    return out, torch.tensor([len(own) for own in ids])
