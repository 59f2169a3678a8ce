"""The session over any causal decoder of transformers, by visar's kernels or its own `forward`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from visar.engine.guidance import Guidance
from visar.engine.kv_cache import KVCache
from visar.engine.prompt_session import PromptSession
from visar.errors import VisarError
from visar.families.hf.attention import Pass, Products, configurations, run
from visar.families.hf.decoder import ImageDecoder
from visar.families.hf.stack import Stack
from visar.families.hf.versions import check_version
from visar.kernels.attention import AttentionMetadata
from visar.kernels.derived import Steady, steady
from visar.kernels.invariant import is_invariant


class TransformersSession(PromptSession):
    """Decode `length` image tokens of a `decoder` for prompts of ids.

    The condition is the ids [B, T] of prompts, padded on the right, and their lengths [B]; for guidance, then those of
    the unconditional batch [B, U] and [B]. The modules of the decoder are used as they are, with whatever adapters and
    hooks its layers have. Layers that visar knows run by its own kernels (`Stack`), unless `own_forward` asks for the
    decoder's `forward`. Raises `VisarError` for a version of transformers that visar does not know, a model in
    training mode, and one that does not decode with the cache that it is given.
    """

    def __init__(
        self,
        decoder: ImageDecoder,
        *condition: Tensor,
        length: int,
        window: int,
        guidance: Guidance = Guidance(),
        aux_layers: Collection[int] | None = None,
        own_forward: bool = False,
    ):
        check_version()
        self.decoder, self._configs = decoder, configurations(decoder.backbone)
        self._own_forward = own_forward
        # Each goes with the time that it is for, as it holds weights that may be replaced after that.
        self._stacks = WeakKeyDictionary[Steady, Stack | None]()
        ids, stack = condition[0], self._stack()
        if aux_layers is not None and stack is None:
            raise VisarError("A drafter reads hidden states of layers that visar knows, and this model has others.")
        if guidance.active and len(condition) < 4:
            raise VisarError("This model has no unconditional prompts; give guidance_scale 1.")
        if decoder.backbone.training:
            raise VisarError("The model is in training mode, in which it drops features at random; call its eval().")
        if is_invariant() and decoder.device.type == "cuda" and stack is None:
            raise VisarError("The invariant mode on a GPU is for layers that visar knows, and this model has others.")
        super().__init__(
            len(ids), length, decoder.vocab, decoder.device, width=max(part.shape[1] for part in condition[::2]),
            dim=decoder.dim, window=window, dtype=decoder.dtype, guidance=guidance, aux_layers=aux_layers,
        )  # fmt: skip
        self.cache = KVCache(
            decoder.layers, len(self.prefix), len(self._slot), decoder.heads, decoder.head_dim, decoder.dtype,
            decoder.device,
        )  # fmt: skip
        self.start(*condition)

    def start(self, *condition: Tensor) -> None:
        self.decoder.start()
        super().start(*condition)

    def _stack(self) -> Stack | None:
        """The layers as visar runs them now; None where they are called."""
        if self._own_forward:
            return None
        if (now := steady()) is None:
            return Stack.of(self.decoder.backbone)
        if now not in self._stacks:
            self._stacks[now] = Stack.of(self.decoder.backbone)
        return self._stacks[now]

    def prompts(self, *condition: Tensor) -> tuple[Tensor, Tensor]:
        parts = condition[: 2 * self.batches]
        width = max(ids.shape[1] for ids in parts[::2])
        ids = torch.cat([F.pad(ids, (0, width - ids.shape[1])) for ids in parts[::2]])
        with self._products():
            return self.decoder.embed_prompt(ids.to(self.device)), torch.cat(parts[1::2]).to(self.device)

    def token_embeddings(self, tokens: Tensor) -> Tensor:
        with self._products():
            return self.decoder.embed(tokens)

    def run(self, x: Tensor, slots: Tensor, at: Tensor, mask: AttentionMetadata | Tensor, visible: int) -> Tensor:
        d, stack = self.decoder, self._stack()
        position_ids = d.position_ids(at, self.prefix)
        if stack is not None:
            table, halves = stack.rotary(position_ids)
            return stack.run(x, table, self.cache.attend(slots, mask, visible, halves), self.aux_layers)
        with self._products():
            return run(d.backbone, self._configs, d.cache_name, x, position_ids, Pass(self.cache, slots, mask, visible))

    def logits(self, hidden: Tensor) -> Tensor:
        with self._products():
            return self.decoder.head(hidden[..., : self.decoder.dim]).float()

    @property
    def head_bytes(self) -> int:
        return self.decoder.head_bytes

    def rotary_rows(self, slots: Tensor) -> Tensor:
        stack = self._stack()
        assert stack is not None
        return stack.rotary(self.decoder.position_ids(slots, self.prefix))[0]

    @contextmanager
    def _products(self) -> Iterator[None]:
        """Linear layers run in visar's forms where these are faster, on a CPU, or asked to be invariant."""
        if self.device.type != "cpu" and not is_invariant():
            yield
            return
        with Products():
            yield
