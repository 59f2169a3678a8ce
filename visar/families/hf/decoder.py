"""What a session needs of a model of transformers: a causal decoder, and which tokens it decodes."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visar.engine.layers import is_torchs
from visar.engine.memory import streamed_bytes
from visar.errors import VisarError
from visar.families.hf.attention import configurations

CACHES = ("cache", "past_key_values")  # what `forward` calls its cache, by version
# What a configuration may ask of logits after the output head, which visar runs without it.
AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class ImageDecoder(ABC):
    """A `model` whose `backbone` gives hidden states, and the embedding and head of `vocab` image tokens.

    A subclass says where the backbone is, how tokens are embedded and what the logits are; `ids` of prompts are those
    of the backbone's own embedding unless it says otherwise. Parts of a model may be replaced between images, so they
    are looked up. Raises `VisarError` for a module that is no causal decoder.
    """

    def __init__(self, model: Any, vocab: int):
        self.model, self.vocab = model, vocab
        parameters = inspect.signature(self.backbone.forward).parameters
        found = [name for name in CACHES if name in parameters]
        if not found or "inputs_embeds" not in parameters or not configurations(self.backbone) or self.layers < 1:
            raise VisarError(f"{type(self.backbone).__name__} is no causal decoder of transformers with a cache.")
        self.cache_name = found[0]

    @property
    def backbone(self) -> Any:
        """The causal decoder of transformers."""
        return self.model

    # The model's sizes, as configurations of transformers name them

    @property
    def config(self) -> Any:
        return self.backbone.config

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def heads(self) -> int:
        """Those of keys and values."""
        return int(getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads)

    @property
    def head_dim(self) -> int:
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def dim(self) -> int:
        return int(self.config.hidden_size)

    @property
    def context(self) -> int:
        """The most positions."""
        return int(self.config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        return torch.device(self.backbone.device)

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.backbone.dtype
        return found

    @property
    def known(self) -> int:
        """How many ids prompts may have."""
        return int(getattr(self.backbone.get_input_embeddings(), "num_embeddings", self.config.vocab_size))

    # What a family says

    @property
    def ends(self) -> Sequence[nn.Module]:
        """What a pass runs before and after the backbone."""
        return ()

    def start(self) -> None:  # noqa: B027 (most keep nothing)
        """Called when a session starts new images: what is kept of weights is read again, into the same memory."""

    def embed_prompt(self, ids: Tensor) -> Tensor:
        """Embeddings [..., dim] of the ids of prompts."""
        found: Tensor = self.backbone.get_input_embeddings()(ids)
        return found

    @abstractmethod
    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [..., dim] of image tokens."""

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., dim]."""

    @property
    def head_weight(self) -> Tensor:
        """A matrix of the head, by which a drafter knows the model that it was trained for."""
        raise VisarError(f"A {type(self).__name__} takes no drafter: it has no head_weight.")

    @property
    def head_bytes(self) -> int:
        """Bytes of weights that `head` reads."""
        return 0

    def position_ids(self, at: Tensor, prefix: Tensor) -> Tensor:
        """What `forward` calls so, for inputs at the positions `at` [rows, W], after prompts of `prefix` [rows]."""
        return at

    @property
    def bytes_per_pass(self) -> int:
        """Bytes of weights that a pass reads."""
        return streamed_bytes(self.backbone) + self.head_bytes


def weight_of(head: nn.Module) -> Tensor:
    """Raises `VisarError` for an adapter that does not give the weight of its layer, as those of PEFT do."""
    if not isinstance(found := getattr(head, "weight", None), Tensor):
        raise VisarError(
            f"A drafter knows its model by the weight of the head, and this {type(head).__name__} has none."
        )
    return found


class VocabularyDecoder(ImageDecoder):
    """A causal language model whose vocabulary holds the image tokens: token n is the id `codes[n]`.

    A pass runs the rows of the output head that are codes, and no others. They are a view of its weight where the codes
    follow one another, and else a copy that is made again for every call. Raises `VisarError` for codes that the
    vocabulary does not have, and for models that change the logits after the head.
    """

    def __init__(self, model: Any, codes: Sequence[int] | Tensor):
        super().__init__(model, len(codes))
        ids = torch.as_tensor(codes)
        if ids.ndim != 1 or ids.is_floating_point() or not len(ids) or len(ids.unique()) < len(ids):
            raise VisarError("The codes of images are ids of the vocabulary, each given once.")
        self.codes, self._span = ids.to(self.device), (int(ids.min()), int(ids.max()))
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._find()

    @property
    def backbone(self) -> Any:
        return self.model.get_decoder()

    def _find(self) -> None:
        """The embedding and the head as they are now. Raises `VisarError` for those that lack codes."""
        self._table, self._head = self.backbone.get_input_embeddings(), self._own_head()
        self._ids = int(getattr(self._head, "out_features", self.config.vocab_size))
        first, last = self._span
        if first < 0 or last >= self._ids:
            raise VisarError(f"The codes go from {first} to {last}; the vocabulary has {self._ids} ids.")
        for name in AFTER_HEAD:
            if getattr(self.config, name, None) not in (None, 1.0):
                raise VisarError(f"visar does not run {type(self.model).__name__}: it changes its logits ({name}).")
        self._slice = is_torchs(self._head)

    @torch.inference_mode(False)
    @torch.no_grad()
    def start(self) -> None:
        self.codes = self.codes.to(self.device)
        self._find()
        if self._slice:
            self._weight = self._rows(self._head.weight, self._weight)
            self._bias = self._rows(self._head.bias, self._bias)

    def _rows(self, whole: Tensor | None, held: Tensor | None) -> Tensor | None:
        """The rows of the codes, in the memory of those `held` where that can be: captured graphs read them there."""
        if whole is None:
            return None
        if bool((self.codes.diff() == 1).all()):
            rows = whole.detach()[int(self.codes[0]) :][: len(self.codes)]
            same = held is not None and (held.data_ptr(), held.dtype) == (rows.data_ptr(), rows.dtype)
            return held if same else rows
        rows = whole.detach()[self.codes]
        fits = held is not None and (held.dtype, held.device) == (rows.dtype, rows.device)
        return held.copy_(rows) if held is not None and fits else rows

    def embed_prompt(self, ids: Tensor) -> Tensor:
        found: Tensor = self._table(ids)
        return found

    def embed(self, tokens: Tensor) -> Tensor:
        return self.embed_prompt(self.codes[tokens])

    def head(self, hidden: Tensor) -> Tensor:
        if not self._slice:  # an adapter, a hook, or weights of another kind: all of the vocabulary
            found: Tensor = self._head(hidden)[..., self.codes]
            return found
        assert self._weight is not None
        return F.linear(hidden, self._weight, self._bias)

    def _own_head(self) -> Any:
        if (head := self.model.get_output_embeddings()) is None:
            raise VisarError(f"{type(self.model).__name__} has no output head, so it is no causal language model.")
        return head

    @property
    def ends(self) -> Sequence[nn.Module]:
        return (self._own_head(),)

    @property
    def head_weight(self) -> Tensor:
        weight = weight_of(self._own_head())
        return weight[self.codes.to(weight.device)]

    @property
    def head_bytes(self) -> int:
        head = streamed_bytes(self._head)
        return head * len(self.codes) // self._ids if self._slice else head
