"""Janus-Pro (Chen et al. 2025, arXiv:2501.17811): a Llama with an embedding and a head of its own for image codes.

Prompts and guidance are those of `JanusForConditionalGeneration.generate(generation_mode="image")`: in the
unconditional batch the prompt's ids are padding, but for its first token and that which begins the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from visar.engine.layout import Layout
from visar.engine.memory import streamed_bytes
from visar.errors import VisarError
from visar.families.hf import deepseek
from visar.families.hf.base import TransformersFamily
from visar.families.hf.decoder import ImageDecoder, weight_of
from visar.families.hf.versions import check_version
from visar.families.registry import register_family
from visar.families.source import Source
from visar.params import SamplingParams

CHAT = "<|User|>: {}\n\n<|Assistant|>:"  # of tokenizers that come without a template
START = "<begin_of_image>"


class JanusDecoder(ImageDecoder):
    """Image codes have an embedding, two layers that align it, and a head of their own."""

    def __init__(self, model: Any):
        super().__init__(model, model.model.vqmodel.config.num_embeddings)

    @property
    def backbone(self) -> Any:
        return self.model.model.language_model

    def embed(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.model.prepare_embeddings_for_image_generation(tokens)
        return found

    def head(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.model.model.generation_head(hidden)
        return found

    @property
    def ends(self) -> Sequence[nn.Module]:
        inner = self.model.model
        return inner.generation_embeddings, inner.generation_aligner, inner.generation_head

    @property
    def head_weight(self) -> Tensor:
        return weight_of(self.model.model.generation_head.vision_head)

    @property
    def head_bytes(self) -> int:
        return streamed_bytes(self.model.model.generation_head)

    @property
    def bytes_per_pass(self) -> int:
        return super().bytes_per_pass + streamed_bytes(self.model.model.generation_aligner)


@register_family
class JanusFamily(TransformersFamily):
    """Janus and Janus-Pro, in transformers' layout (deepseek-community/...) or DeepSeek's own (deepseek-ai/...)."""

    name = "janus"
    model_type = "janus"
    architecture = "JanusForConditionalGeneration"
    as_configured = True

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return super().recognises(source) or source.config.get("model_type") == deepseek.MODEL_TYPE

    @classmethod
    def load(cls, source: Source) -> Self:
        if source.config.get("model_type") != deepseek.MODEL_TYPE:
            return super().load(source)
        check_version()
        return cls(*deepseek.load_deepseek(source))

    def made(self) -> None:
        model, tokenizer = self.model, self.tokenizer
        config = model.config.vq_config
        side = config.num_patches
        if model.config.vision_config.num_image_tokens != side**2:
            raise VisarError(f"This Janus has {side} x {side} cells of an image, and another number of image tokens.")
        self.decoder, self.layout = JanusDecoder(model), Layout(side, side)
        self._pixels = side * 2 ** (len(config.channel_multiplier) - 1)
        self.defaults = SamplingParams(
            guidance_scale=5.0, guidance_interval=-1, guidance_schedule="constant", temperature=1.0, top_k=0, top_p=1.0
        )
        own = model.generation_config
        kept = getattr(own, "generation_kwargs", None) or {}
        self.start_text = getattr(tokenizer, "boi_token", None) or START
        start, first = kept.get("boi_token_id"), own.bos_token_id
        self._start = tokenizer.convert_tokens_to_ids(self.start_text) if start is None else start
        self._first = tokenizer.bos_token_id if first is None else first
        self._padding = tokenizer.pad_token_id if own.pad_token_id is None else own.pad_token_id
        for what, found in (("begins an image", self._start), ("pads prompts", self._padding)):
            if found is None or found == tokenizer.unk_token_id:
                raise VisarError(f"The tokenizer of this Janus has no token that {what}.")

    def prompt_ids(self, text: str) -> tuple[list[int], list[int]]:
        ids = self._tokens(text)
        return ids, [i if i in (self._first, self._start) else self._padding for i in ids]

    def _tokens(self, text: str) -> list[int]:
        """The ids of a user's message and of the image's beginning."""
        if getattr(self.processor, "chat_template", None):
            message = {"role": "user", "content": [{"type": "text", "text": text}]}
            chat = self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        else:
            chat = CHAT.format(text)
        found: list[int] = self.tokenizer(chat + self.start_text)["input_ids"]
        return found

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        pixels = self.model.decode_image_tokens(tokens.to(self.device)).float()  # [B, H, W, 3], about [-1, 1]
        return (pixels / 2 + 0.5).clamp(0, 1).permute(0, 3, 1, 2).contiguous()

    @property
    def pixels(self) -> tuple[int, int]:
        return self._pixels, self._pixels

    @property
    def codebook(self) -> Tensor:
        return F.normalize(self.model.model.vqmodel.quantize.embedding.weight, dim=-1)
