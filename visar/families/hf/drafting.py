"""A decoder of transformers as the target of drafters, by `visar.drafters.base.DrafterTarget`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from visar.engine.decoder import Attend
from visar.engine.guidance import Guidance
from visar.errors import VisarError
from visar.families.hf.decoder import ImageDecoder
from visar.families.hf.stack import Stack
from visar.families.weights import load_state


class TargetModel(nn.Module):
    """An `ImageDecoder` as a `visar.engine.decoder.Decoder`; its weights are those of the user's module."""

    def __init__(self, decoder: ImageDecoder):
        super().__init__()
        if (stack := Stack.of(decoder.backbone)) is None:
            raise VisarError("A drafter reads hidden states of layers that visar knows, and this model has others.")
        self.decoder, self.stack, self.backbone = decoder, stack, decoder.backbone
        self.head_dim = stack.head_dim
        c = decoder.config
        self.config = SimpleNamespace(
            vocab_size=decoder.vocab, dim=decoder.dim, num_layers=decoder.layers, ffn=int(c.intermediate_size),
            num_heads=decoder.dim // self.head_dim,
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    @property
    def norm(self) -> Any:
        return self.backbone.norm

    @property
    def output(self) -> Any:
        """What a fingerprint is made of."""
        return SimpleNamespace(weight=self.decoder.head_weight)

    def tok_embeddings(self, tokens: Tensor) -> Tensor:
        return self.decoder.embed(tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.decoder.head(hidden[..., : self.config.dim]).float()

    def run(self, x: Tensor, table: Tensor, attend: Attend, aux_layers: Collection[int] = ()) -> Tensor:
        """As `Decoder.run`: `attend` turns pairs that lie next to each other, and knows no heads that share keys."""
        heads, shared, turning = self._heads, self.decoder.heads, self._turning

        def whole(layer: int, qkv: Tensor, rows: Tensor) -> Tensor:
            q, k, v = qkv.split([heads, shared, shared], dim=2)
            q, k = q[..., turning], k[..., turning]
            k, v = (part.repeat_interleave(heads // shared, 2) for part in (k, v))
            return attend(layer, torch.cat([q, k, v], dim=2), rows)

        return self.stack.run(x, table, whole, aux_layers)

    @property
    def _heads(self) -> int:
        """Those of queries."""
        return int(self.decoder.config.num_attention_heads)

    @cached_property
    def _turning(self) -> Tensor:
        """The numbers of a head with those of a pair next to each other; those that do not turn stay."""
        at = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        halves = self.stack.rotary(self.decoder.position_ids(at, at[0]))[1]
        pairs = torch.arange(2 * halves).view(2, halves).T.flatten()
        return torch.cat([pairs, torch.arange(2 * halves, self.head_dim)]).to(self.device)


@dataclass(frozen=True)
class TransformersTarget:
    """A decoder of transformers; methods are described in `DrafterTarget`."""

    decoder: ImageDecoder
    length: int

    masked: ClassVar[bool] = False
    layered: ClassVar[bool] = False
    smaller_kind: ClassVar[str] = "model"
    network: ClassVar[Any] = None
    folder: ClassVar[str] = "model"

    @cached_property
    def model(self) -> TargetModel:
        return TargetModel(self.decoder)

    def read(self, path: Path) -> dict[str, Tensor]:
        return load_state(path)

    def of_state(self, state: Mapping[str, Tensor], path: str | Path) -> NoReturn:
        raise VisarError(
            f"{path} holds no drafter for a model of transformers: give a folder of `visar train drafter`."
        )

    def check(self, model: Any, path: str | Path) -> NoReturn:
        self._refuse()

    def given(self, encoded: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, batches, T]: prompts end where the image begins, so they are padded on the left."""
        width = max(ids.shape[1] for ids in encoded[::2])
        condition, mask = [], []
        for ids, lengths in zip(encoded[::2], encoded[1::2], strict=True):
            at = torch.arange(width) - (width - lengths)[:, None]
            condition.append(ids.gather(1, at.clamp(0, ids.shape[1] - 1)))
            mask.append(at >= 0)
        return torch.stack(condition, 1), torch.stack(mask, 1)

    def embedded(self, model: TargetModel, condition: Tensor, tokens: Tensor, guided: bool) -> Tensor:
        self.decoder.start()
        batches = 2 if guided else 1
        prompts = self.decoder.embed_prompt(condition[:, :batches].transpose(0, 1).flatten(0, 1))
        return torch.cat([prompts, self.decoder.embed(tokens[:, :-1]).repeat(batches, 1, 1)], dim=1)

    def table(self, model: TargetModel, prefix: int) -> Tensor:
        """Slots count from the padding: angles of two inputs count by their distance."""
        at = torch.arange(prefix + self.length, device=self.decoder.device)[None]
        return model.stack.rotary(self.decoder.position_ids(at, at.new_full((1,), prefix)))[0][0]

    def smaller(self, layers: int) -> NoReturn:
        self._refuse()

    def with_layers(self, layers: Sequence[nn.Module], norm: nn.Module) -> NoReturn:
        self._refuse()

    def session(self, model: Any, encoded: Sequence[Tensor], window: int, guidance: Guidance) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise VisarError("Drafters of a model of transformers are not made of its layers, and not smaller models.")
