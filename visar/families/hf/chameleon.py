"""Chameleon (Meta 2024, arXiv:2405.09818), whose image head Anole trained (arXiv:2407.06135), and Lumina-mGPT
(arXiv:2408.02657), which has its architecture, its vocabulary and its image tokenizer.

`ChameleonForConditionalGeneration` forbids codes of images, so passes run its decoder and the rows of its output head
that are codes. It has no decoder of pixels either: Meta's `vqgan.ckpt` is read by visar.

Prompts and guidance are those of the authors' code for text to image. Meta's has three batches, and the one whose
prompts are images alone is here the unconditional one: l = u + 3 (c - u), whatever the scale of images is. Lumina-mGPT
writes the image's size itself, and here it is given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from typing_extensions import Self

from visar.engine.layout import Layout
from visar.engine.memory import streamed_bytes
from visar.errors import VisarError
from visar.families.hf.base import SPECIAL, TransformersFamily
from visar.families.hf.decoder import VocabularyDecoder
from visar.families.hf.grid import GridDecoder, GridFamily, cells_of
from visar.families.hf.loading import load_model, load_processor, unreadable
from visar.families.hf.meta import PIXELS, is_meta, load_meta, meta_folders
from visar.families.hf.versions import check_version
from visar.families.hf.vqgan import VQGAN
from visar.families.registry import register_family
from visar.families.source import Source
from visar.params import SamplingParams

PART = "vqgan"  # the component that makes pixels
FILES = ("vqgan.ckpt", "tokenizer/vqgan.ckpt", "vqgan.safetensors")  # in the model's folder
WITHIN = "model.vqmodel."  # of the keys of a decoder that a converted folder has among the model's weights
CARRIED = tuple(WITHIN + name for name in ("decoder.", "post_quant_conv.", "quantize.embedding."))
FIRST, TURN_END, LINE_END = "<s>", "<reserved08706>", "<reserved08799>"
IMAGE_START, IMAGE_END = "<racm3:break>", "<eoss>"
ASK = "Generate an image of {}x{} according to the following prompt:\n{}"  # width, height, prompt
GRID = 32  # Lumina-mGPT gives the image's size in these pixels
SIDE = 768  # of its images, where neither the caller nor the model's name says another


def is_lumina(config: Mapping[str, Any], name: str) -> bool:
    """Whether a Chameleon's configuration, or the name of its folder or repository, is that of a Lumina-mGPT."""
    return "mask_image_logits" in config or "lumina" in name.lower()


class ChameleonDecoder(VocabularyDecoder):
    """The codes of images alone."""

    @property
    def bytes_per_pass(self) -> int:
        """Without the encoder of images, which is a part of the module."""
        return super().bytes_per_pass - streamed_bytes(self.backbone.vqmodel)


class LuminaDecoder(ChameleonDecoder, GridDecoder):
    """The codes, and the token that ends a row."""


class _Chameleon(TransformersFamily):
    """What the two have in common. `vqgan` is their decoder of pixels; without it they decode tokens alone."""

    model_type = "chameleon"
    architecture = "ChameleonForConditionalGeneration"
    has_vocabulary_map = as_configured = True
    lumina = False

    def __init__(self, model: Any, processor: Any, vqgan: VQGAN | None = None, size: tuple[int, int] | None = None):
        self.size = size
        super().__init__(model, processor)
        if vqgan is None:
            return
        self.components[PART] = vqgan
        if (vqgan.cell, vqgan.embedding.num_embeddings) != (self.cell, len(self.codes)):
            raise VisarError(
                f"The image decoder has {vqgan.embedding.num_embeddings} codes of {vqgan.cell} pixels, and this model "
                f"{len(self.codes)} of {self.cell}."
            )

    # Finding and loading

    @classmethod
    def recognises(cls, source: Source) -> bool:
        if is_meta(source):
            return not cls.lumina
        return super().recognises(source) and is_lumina(source.config, source.name) == cls.lumina

    @classmethod
    def load(cls, source: Source) -> Self:
        cls.check_layout(source)
        assert source.folder is not None
        check_version()
        vqgan, processor = image_decoder(source.folder), load_processor(source.folder)
        model = load_model(cls.architecture, source.folder)
        return cls(model, processor, vqgan, source.size or side_of(source.name))

    @classmethod
    def wraps(cls, model: Any) -> bool:
        return super().wraps(model) and is_lumina(model.config.to_dict(), model.config.name_or_path) == cls.lumina

    @classmethod
    def around(cls, model: Any, processor: Any) -> Self:
        cls.check_processor(model, processor)
        name = model.config.name_or_path
        return cls(model, processor, image_decoder(Path(name)) if name else None, side_of(name))

    def replace(self, name: str, component: Any) -> None:
        parts = self.components | {name: component}
        made = type(self)(parts["model"], self.processor, parts.get(PART), self.size)
        vars(self).clear()
        vars(self).update(vars(made))

    # Tokens

    def id_of(self, token: str) -> int:
        """Raises `VisarError` for a token that model or tokenizer do not have, or not as the same id."""
        own = self.tokenizer.convert_tokens_to_ids(token)
        if (found := self.model.model.vocabulary_mapping.vocab_map.get(token)) is None:
            raise VisarError(f"The vocabulary of this {self.title} has no token {token}.")
        if own != found:
            raise VisarError(
                f"The tokenizer is not that of this {self.title}: {token} is {own} to it, and {found} to the model."
            )
        return int(found)

    @property
    def title(self) -> str:
        return "Lumina-mGPT" if self.lumina else "Chameleon"

    @property
    def codes(self) -> list[int]:
        """The ids of the image tokenizer's codes. Raises `VisarError` if the vocabulary lacks one."""
        found, count = self.model.model.vocabulary_mapping.img2bpe, self.model.config.vq_config.num_embeddings
        if sorted(found) != list(range(count)):
            raise VisarError(
                f"The vocabulary of this {self.title} has {len(found)} tokens IMGIMG..., and its image tokenizer "
                f"{count} codes."
            )
        return [found[n] for n in range(count)]

    def words(self, text: str) -> list[int]:
        """Raises `VisarError` for a text with tokens that are none of words."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not self._reserved.isdisjoint(ids):
            raise VisarError(SPECIAL)
        return ids

    def made(self) -> None:
        self._first, self._turn = self.id_of(self.tokenizer.bos_token or FIRST), self.id_of(TURN_END)
        self._start, self._end = self.id_of(IMAGE_START), self.id_of(IMAGE_END)
        self._reserved = {*self.codes, self._start, self._end, self._turn}

    # Pixels

    @property
    def cell(self) -> int:
        return int(2 ** (len(self.model.config.vq_config.channel_multiplier) - 1))

    def check_decoding(self) -> None:
        if PART not in self.components:
            raise VisarError(
                f"This {self.title} has no decoder of pixels: put Meta's file tokenizer/vqgan.ckpt into its folder, or "
                "ask for tokens (output_type='tokens')."
            )

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        self.check_decoding()
        vqgan = self.components[PART]
        images = vqgan(self.layout.cells(tokens.to(vqgan.embedding.weight.device)))
        return (images.float() / 2 + 0.5).clamp(0, 1)

    @property
    def codes_of_images(self) -> Tensor:
        found: Tensor = self.model.model.vqmodel.quantize.embedding.weight
        return found


@register_family
class ChameleonFamily(_Chameleon):
    """Anole, or another Chameleon that makes images, in transformers' layout (leloy/Anole-7b-v0.1-hf) or Meta's own."""

    name = "chameleon"

    @classmethod
    def load(cls, source: Source) -> Self:
        if not is_meta(source):
            return super().load(source)
        check_version()
        weights, tokenizer = meta_folders(source)
        vqgan = VQGAN.load(tokenizer / PIXELS)
        return cls(*load_meta(weights, tokenizer), vqgan)

    def made(self) -> None:
        super().made()
        self.decoder = ChameleonDecoder(self.model, self.codes)
        side = int(self.model.config.vq_config.resolution) // self.cell
        self.layout = Layout(side, side)
        if self.room < 1:
            raise VisarError(
                f"An image has {self.layout.length} tokens, and this model {self.decoder.context} positions for them "
                "and the prompt."
            )
        self.defaults = SamplingParams(
            guidance_scale=3.0, guidance_interval=-1, guidance_schedule="constant", temperature=0.7, top_k=0, top_p=0.9
        )

    def prompt_ids(self, text: str) -> tuple[list[int], list[int]]:
        return [self._first, *self.words(text), self._turn, self._start], [self._first, self._start]

    @property
    def pixels(self) -> tuple[int, int]:
        return self.layout.rows * self.cell, self.layout.columns * self.cell

    @property
    def codebook(self) -> Tensor:
        return self.codes_of_images


@register_family
class LuminaFamily(_Chameleon, GridFamily):
    """Lumina-mGPT (Alpha-VLLM/Lumina-mGPT-7B-512, -768, -768-Omni, -1024, -34B-512).

    It is for images of one size, in steps of 32 pixels, which `sized` changes. What its prompts ask for, and the two
    tokens of the image's size, are those of the authors' code.
    """

    name = "lumina-mgpt"
    lumina = True

    def made(self) -> None:
        super().made()
        self.size = height, width = self.size or (SIDE, SIDE)
        cells_of(self.size, GRID)
        self._sizes = [self.id_of(f"<reserved{8800 + side // GRID:05d}>") for side in (height, width)]
        line_end = self.id_of(LINE_END)
        decoder = LuminaDecoder(self.model, self.codes, line_end)
        self.set_grid(decoder, *cells_of(self.size, self.cell), [line_end, self._end, self._turn])
        self._reserved |= {line_end, *self._sizes}
        self.defaults = SamplingParams(
            guidance_scale=3.0, guidance_interval=-1, guidance_schedule="constant", temperature=1.0, top_k=2000,
            top_p=1.0,
        )  # fmt: skip

    @property
    def codebook(self) -> Tensor:
        """The token that ends a row is like no code: it lies far from all of them."""
        codes = self.codes_of_images
        return torch.cat([codes, codes.new_full((1, codes.shape[1]), 10 * float(codes.abs().max()))])

    def of_size(self, size: tuple[int, int]) -> Self:
        return type(self)(self.model, self.processor, self.components.get(PART), size)

    def prompt_ids(self, text: str) -> tuple[list[int], list[int]]:
        assert self.size is not None
        image = [self._start, *self._sizes]
        words = self.words(ASK.format(self.size[1], self.size[0], text))
        return [self._first, *words, self._turn, *image], image


def side_of(name: str) -> tuple[int, int] | None:
    """Height and width that the name of a published Lumina-mGPT ends with."""
    found = re.search(r"-(512|768|1024)(-Omni)?/?$", name)
    return found and (int(found[1]), int(found[1]))


def image_decoder(folder: Path) -> VQGAN | None:
    """The decoder of pixels in a model's folder, in a file of its own or among the model's weights, None without one.

    Raises `VisarError` for one that is damaged, or of which tensors are missing.
    """
    for name in FILES:
        if (folder / name).is_file():
            return VQGAN.load(folder / name)
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as weights:
                found = [key for key in weights.keys() if key.startswith(CARRIED)]  # noqa: SIM118 (it is no dict)
                state |= {key.removeprefix(WITHIN): weights.get_tensor(key).float() for key in found}
        except Exception as error:  # of a file that is cut, which the model's loader then names
            raise unreadable("the weights", file, error) from error
    return VQGAN.of(state, folder) if any(key.startswith("decoder.") for key in state) else None
