"""Tiny random decoders of transformers for the tests of sessions; a new family adds its own to `WORLDS`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.helpers.tiny_chameleon import tiny_chameleon
from tests.helpers.tiny_emu3 import tiny_emu3, vocabulary
from tests.helpers.tiny_glm import tiny_glm
from tests.helpers.tiny_hf import spread, tiny_janus
from visar.engine.guidance import Guidance
from visar.families.hf.base import padded
from visar.families.hf.chameleon import ChameleonDecoder
from visar.families.hf.decoder import ImageDecoder, VocabularyDecoder
from visar.families.hf.glm_image import GlmDecoder
from visar.families.hf.grid import GridDecoder
from visar.families.hf.janus import JanusDecoder
from visar.families.hf.session import TransformersSession

CODES = (9, 3, 17, 12)  # ids of images in a vocabulary, in no order


@dataclass(frozen=True)
class World:
    """A `model` with its `decoder`, and prompts and unconditional prompts of unlike lengths.

    `scale` 1 is a model without guidance.
    `stock(ids [T], tokens [B, n])` gives logits [B, n + 1, V] by one pass over the whole sequence, without visar.
    """

    model: Any
    decoder: ImageDecoder
    scale: float = 2.0
    prompts: tuple[tuple[int, ...], ...] = ((1, 5, 6, 7, 2), (1, 8, 2), (1, 9, 10, 5, 6, 11, 2))
    others: tuple[tuple[int, ...], ...] = ((1, 0, 0, 2), (1, 0, 0, 0, 0, 2), (1, 2))

    def stock(self, ids: tuple[int, ...], tokens: Tensor) -> Tensor:
        d = self.decoder
        d.start()
        prompt = torch.tensor([ids]).expand(len(tokens), -1)
        x = torch.cat([d.embed_prompt(prompt), d.embed(tokens)], dim=1)
        at = torch.arange(x.shape[1]).expand(len(x), -1)
        hidden = d.backbone(
            inputs_embeds=x, position_ids=d.position_ids(at, torch.full((len(x),), len(ids))), use_cache=False
        )[0]
        return d.head(hidden[:, len(ids) - 1 :]).float()

    def guided(self, row: int, tokens: Tensor) -> Tensor:
        """Guided logits [B, n + 1, V] of the prompt `row`, as `stock` gives them."""
        c = self.stock(self.prompts[row], tokens)
        if self.scale == 1:
            return c
        u = self.stock(self.others[row], tokens)
        return u + self.scale * (c - u)

    def condition(self, rows: list[int]) -> tuple[Tensor, ...]:
        made = padded([self.prompts[row] for row in rows], 8)
        return made if self.scale == 1 else made + padded([self.others[row] for row in rows], 7)

    def session(
        self,
        rows: list[int],
        window: int,
        length: int = 5,
        guidance: Guidance | None = None,
        made: Callable[..., TransformersSession] = TransformersSession,
    ) -> TransformersSession:
        guidance = Guidance(self.scale) if guidance is None else guidance
        return made(self.decoder, *self.condition(rows), length=length, window=window, guidance=guidance)


def janus() -> World:
    model = spread(tiny_janus(vocab=4, side=4), seed=3)
    return World(model, JanusDecoder(model))


def causal(kind: str, **more: Any) -> World:
    """A stock language model with 4 heads of queries and 2 of keys, and codes among its ids."""
    import transformers

    sizes = dict(
        vocab_size=24, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes | more)
    model = spread(getattr(transformers, f"{kind}ForCausalLM")(config), seed=5)
    return World(model, VocabularyDecoder(model, CODES))


def glm_image() -> World:
    """A draft of 2 x 2 tokens and an image of 3 x 3, without guidance."""
    model = tiny_glm(codes=4, seed=7)
    return World(model, GlmDecoder(model, 4, ((2, 2), (3, 3))), scale=1.0)


class Emu3World(World):
    """Emu3 by its whole model and vocabulary; the token that ends a row has logit 0."""

    def stock(self, ids: tuple[int, ...], tokens: Tensor) -> Tensor:
        d: Any = self.decoder
        whole = torch.tensor([*d.codes.tolist(), d.line_end])
        logits = d.model(torch.cat([torch.tensor([ids]).expand(len(tokens), -1), whole[tokens]], dim=1)).logits
        return torch.cat([logits[..., d.codes], torch.zeros_like(logits[..., :1])], dim=-1)[:, len(ids) - 1 :]


def emu3() -> World:
    model = tiny_emu3(codes=3)
    return Emu3World(model, GridDecoder(model, model.vocabulary_mapping.image_tokens, vocabulary(3)["<|extra_200|>"]))


class ChameleonWorld(World):
    """A Chameleon by its decoder and the whole output head: its own `forward` forbids codes of images."""

    def stock(self, ids: tuple[int, ...], tokens: Tensor) -> Tensor:
        d: Any = self.decoder
        hidden = self.model.model(torch.cat([torch.tensor([ids]).expand(len(tokens), -1), d.codes[tokens]], dim=1))[0]
        logits: Tensor = self.model.lm_head(hidden)[:, len(ids) - 1 :, d.codes]
        return logits


def chameleon() -> World:
    model = tiny_chameleon(codes=4)
    return ChameleonWorld(model, ChameleonDecoder(model, model.model.vocabulary_mapping.image_tokens))


WORLDS: dict[str, Callable[[], World]] = {
    "glm-image": functools.cache(glm_image),
    "janus": functools.cache(janus),
    "qwen3": functools.cache(lambda: causal("Qwen3", head_dim=12)),
    "mistral": functools.cache(lambda: causal("Mistral")),  # by its own forward: visar does not know its layers
    "emu3": functools.cache(emu3),
    "chameleon": functools.cache(chameleon),
}
