"""Emu3.5-Image (Cui et al. 2025, arXiv:2510.26583): a Qwen3 whose vocabulary holds words and 131,072 codes of images.

The published repository runs by code of its own; the weights are those of a Qwen3 by name and shape, so transformers'
Qwen3 runs them. Prompts, guidance and the order of the tokens are those of the authors' code for text to image; there
the model writes the image's size itself, and here it is given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from visar.errors import VisarError
from visar.families.hf.emu3 import CODE, EMU3_VOCABULARY, IMAGE, IMAGE_END, IMAGE_START, LINE_END
from visar.families.hf.grid import GridDecoder, GridFamily, cells_of
from visar.families.hf.loading import load_model, load_processor
from visar.families.hf.versions import check_version
from visar.families.hf.vqgan import VQGAN
from visar.families.registry import register_family
from visar.families.source import Source
from visar.params import SamplingParams

PART = "vision_tokenizer"  # the folder of the image tokenizer within that of the model
SIZE = 1024, 1024  # by default
BEGIN, ANSWER = "<|extra_203|>", "<|extra_100|>"
FIRST_CODE = f"{CODE} 000000|>"
# The published ids, for tokenizers that know words alone, as Qwen3's own does.
IDS = {
    BEGIN: 151849, ANSWER: 151746, LINE_END: 151846, IMAGE_START: 151852, IMAGE: 151851, IMAGE_END: 151853,
    FIRST_CODE: 151854,
}  # fmt: skip
USER = "You are a helpful assistant for t2i task. USER: {} ASSISTANT: "
NOTHING = "You are a helpful assistant. USER:  ASSISTANT: "
# What a Qwen3 has of the published configuration; its model_type names code of its own.
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
    "tie_word_embeddings", "attention_bias",
)  # fmt: skip


@register_family
class Emu35Family(GridFamily):
    """Emu3.5-Image: the `model`, a Qwen3ForCausalLM, the tokenizer of its words, and its `vision_tokenizer`.

    Images are of one `size`, height and width in pixels.
    """

    name = "emu3.5"
    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"

    def __init__(self, model: Any, processor: Any, vision_tokenizer: VQGAN, size: tuple[int, int] = SIZE):
        self.vision_tokenizer, self._size = vision_tokenizer, size
        super().__init__(model, processor)
        self.components[PART] = vision_tokenizer

    @classmethod
    def recognises(cls, source: Source) -> bool:
        if source.folder is None or source.config.get("model_type") not in ("qwen3", "Emu3"):
            return False
        return source.config.get("vocab_size", 0) > EMU3_VOCABULARY or (source.folder / PART).is_dir()

    @classmethod
    def load(cls, source: Source) -> Self:
        assert source.folder is not None
        check_version()
        if not (source.folder / PART).is_dir():
            raise VisarError(
                f"{source.name} has no image tokenizer: put the files of BAAI/Emu3.5-VisionTokenizer into its folder "
                f"{PART!r}."
            )
        vision, processor = VQGAN.load(source.folder / PART), load_processor(source.folder)
        model = load_model(cls.architecture, source.folder, _config(source), strict=True)
        return cls(model, processor, vision, source.size or SIZE)

    @classmethod
    def wraps(cls, model: Any) -> bool:
        return False  # a Qwen3 alone does not say whether it is one of these

    def replace(self, name: str, component: Any) -> None:
        parts = self.components | {name: component}
        made = type(self)(parts["model"], self.processor, parts[PART], self._size)
        vars(self).clear()
        vars(self).update(vars(made))

    def of_size(self, size: tuple[int, int]) -> Self:
        return type(self)(self.model, self.processor, self.vision_tokenizer, size)

    def made(self) -> None:
        count, size = self.vision_tokenizer.embedding.num_embeddings, int(self.model.config.vocab_size)
        first = self._id(FIRST_CODE)
        if first + count > size:
            raise VisarError(
                f"The codes of images are the ids {first} to {first + count - 1}, and the vocabulary of this model has "
                f"{size} ids: it is no Emu3.5."
            )
        decoder = GridDecoder(self.model, range(first, first + count), self._id(LINE_END))
        self.set_grid(decoder, *cells_of(self._size, self.cell), [self._id(IMAGE_END)])
        self._nothing = self._prompt(NOTHING)
        self.defaults = SamplingParams(
            guidance_scale=5.0, guidance_interval=-1, guidance_schedule="constant", temperature=1.0, top_k=5120,
            top_p=1.0,
        )  # fmt: skip

    def _id(self, name: str) -> int:
        found = self.processor.convert_tokens_to_ids(name)
        if found is not None and found != self.processor.unk_token_id:
            return int(found)
        if (published := IDS[name]) >= int(self.model.config.vocab_size):
            raise VisarError(f"The tokenizer of this Emu3.5 has no token {name}.")
        return published

    def prompt_ids(self, text: str) -> tuple[list[int], list[int]]:
        return self._prompt(USER.format(text)), self._nothing

    def _prompt(self, text: str) -> list[int]:
        """The ids of a request, and of the beginning of an image of this size."""
        parts = text, f"{self.layout.rows}*{self.layout.columns}"
        words, size = (self.processor(part, add_special_tokens=False)["input_ids"] for part in parts)
        start, answer, image, codes = (self._id(name) for name in (BEGIN, ANSWER, IMAGE_START, IMAGE))
        return [start, *words, answer, image, *size, codes]

    @torch.no_grad()
    def decode(self, tokens: Tensor, batch: int = 2) -> Tensor:
        cells = self.layout.cells(tokens.to(self.vision_tokenizer.embedding.weight.device))
        images = torch.cat([self.vision_tokenizer(part).float() for part in cells.split(batch)])
        return (images / 2 + 0.5).clamp(0, 1)

    @property
    def cell(self) -> int:
        return self.vision_tokenizer.cell

    @property
    def codes_of_images(self) -> Tensor:
        return self.vision_tokenizer.embedding.weight


def _config(source: Source) -> Any:
    """The configuration of a Qwen3 for a repository whose own names code, None for one that is a Qwen3's."""
    if source.config.get("model_type") == "qwen3":
        return None
    from transformers import Qwen3Config

    return Qwen3Config(**{name: source.config[name] for name in SIZES if source.config.get(name) is not None})
