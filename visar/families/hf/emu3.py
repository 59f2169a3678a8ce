"""Emu3-Gen (Wang et al. 2024, arXiv:2409.18869): a decoder whose vocabulary holds words and codes of images.

Prompts are those of transformers' `Emu3Processor`. The unconditional batch has the authors' negative prompt, and like
theirs it begins an image of the same size; the example in transformers' documentation leaves that out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from visar.errors import VisarError
from visar.families.hf.base import SPECIAL
from visar.families.hf.grid import GridDecoder, GridFamily, cells_of
from visar.families.hf.loading import load_model, load_processor
from visar.families.hf.versions import check_version
from visar.families.registry import register_family
from visar.families.source import Source
from visar.params import SamplingParams

NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
CODE, LINE_END, FRAME_END = "<|visual token", "<|extra_200|>", "<|extra_201|>"
IMAGE_START, IMAGE, IMAGE_END = "<|image start|>", "<|image token|>", "<|image end|>"
EMU3_VOCABULARY = 184622


@register_family
class Emu3Family(GridFamily):
    """Emu3-Gen in transformers' layout (Emu3-community/Emu3-Gen-hf).

    Images are of one `size`, height and width in pixels: by default that of the processor, which has `image_area`
    (720 x 720) and `ratio` (width:height).
    """

    name = "emu3"
    model_type = "emu3"
    architecture = "Emu3ForConditionalGeneration"
    has_vocabulary_map = as_configured = True

    def __init__(self, model: Any, processor: Any, size: tuple[int, int] | None = None):
        self._size = size
        super().__init__(model, processor)

    @classmethod
    def foreign(cls, source: Source) -> str:
        config: Any = source.config  # Emu3.5, whose vocabulary is larger, is a family of its own
        if config.get("model_type") != "Emu3" or config.get("vocab_size", EMU3_VOCABULARY) > EMU3_VOCABULARY:
            return ""
        return (
            "is in the layout of BAAI's own code, which visar does not run; give the same weights in transformers' "
            "layout, such as Emu3-community/Emu3-Gen-hf."
        )

    @classmethod
    def load(cls, source: Source) -> Self:
        cls.check_layout(source)
        assert source.folder is not None
        check_version()
        return cls(load_model(cls.architecture, source.folder), load_processor(source.folder), source.size)

    def replace(self, name: str, component: Any) -> None:
        made = type(self)(component, self.processor, self._size)
        vars(self).clear()
        vars(self).update(vars(made))

    def of_size(self, size: tuple[int, int]) -> Self:
        return type(self)(self.model, self.processor, size)

    def made(self) -> None:
        mapping, vq = self.model.vocabulary_mapping, self.model.model.vqmodel
        codes = mapping.img2bpe
        if sorted(codes) != list(range(vq.config.codebook_size)):
            raise VisarError(
                f"The vocabulary of this Emu3 has {len(codes)} tokens {CODE} ...|>, and its image tokenizer "
                f"{vq.config.codebook_size} codes."
            )
        if not hasattr(self.processor, "calculate_generate_size"):
            raise VisarError("This Emu3 has a tokenizer alone; the Emu3Processor of its prompts is missing.")
        self._token = mapping.vocab_map.get
        tail = [self._id(name) for name in (LINE_END, FRAME_END, IMAGE_END)]
        self.set_grid(
            GridDecoder(self.model, [codes[n] for n in range(len(codes))], tail[0]),
            *self._cells(),
            [*tail, self.processor.tokenizer.eos_token_id],
        )
        self._negative = self._prompt(NEGATIVE)
        self.defaults = SamplingParams(
            guidance_scale=3.0, guidance_interval=-1, guidance_schedule="constant", temperature=1.0, top_k=2048,
            top_p=1.0,
        )  # fmt: skip

    def _id(self, name: str) -> int:
        found = self.processor.tokenizer.convert_tokens_to_ids(name)
        if found is None or found == self.processor.tokenizer.unk_token_id:
            raise VisarError(f"The tokenizer of this Emu3 has no token {name}.")
        return int(found)

    def _cells(self) -> tuple[int, int]:
        """Rows and columns of an image, by default those that the processor's prompts ask for."""
        if self._size is not None:
            return cells_of(self._size, self.cell)
        p = self.processor
        try:
            rows, columns = p.calculate_generate_size(p.ratio, p.image_area, self.cell)
        except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise VisarError(
                f"The processor's ratio must be like '4:3' and its image_area a number of pixels, not {p.ratio!r} and "
                f"{p.image_area!r}."
            ) from error
        return cells_of((rows * self.cell, columns * self.cell), self.cell)

    def prompt_ids(self, text: str) -> tuple[list[int], list[int]]:
        if self.processor.image_token in text:
            raise VisarError(SPECIAL)
        return self._prompt(text), self._negative

    def _prompt(self, text: str) -> list[int]:
        height, width = self.pixels
        made = self.processor(
            text=[text], return_for_image_generation=True, ratio=f"{width}:{height}", image_area=height * width
        )
        found: list[int] = made["input_ids"][0]
        return found

    @torch.no_grad()
    def decode(self, tokens: Tensor, batch: int = 2) -> Tensor:
        rows, columns = self.layout.rows, self.layout.columns
        images = torch.cat(
            [
                self.model.decode_image_tokens(image_tokens=ids, height=rows, width=columns).float()
                for ids in self.ids(tokens.to(self.device)).split(batch)
            ]
        )
        own = self.processor.image_processor
        mean, std = (images.new_tensor(list(of)).view(-1, 1, 1) for of in (own.image_mean, own.image_std))
        return (images * std + mean).clamp(0, 1)

    @property
    def cell(self) -> int:
        return int(self.model.model.vqmodel.spatial_scale_factor)

    @property
    def codes_of_images(self) -> Tensor:
        found: Tensor = self.model.model.vqmodel.quantize.embedding.weight
        return found
