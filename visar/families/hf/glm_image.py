"""GLM-Image (Z.ai 2026): a GLM-4 of 9 B parameters decodes codes, of which a diffusion transformer makes pixels.

The tokens of an image are a small draft of it first, then the image; both are grids of rows. A prompt ends with both
sizes and a token that begins the image, as `GlmImageProcessor` writes it. There is no guidance. Token n, in a grid that
begins `g` positions after a prompt of p tokens, has the rotary positions (p + g, p + g + row, p + g + column), and the
next grid begins max(rows, columns) later.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from visar.engine.layout import Layout
from visar.errors import VisarError
from visar.families.hf.base import SPECIAL, TransformersFamily
from visar.families.hf.decoder import VocabularyDecoder
from visar.families.hf.glm_pipeline import GlmPixels, faster_pipeline
from visar.families.hf.loading import load_model, load_processor
from visar.families.hf.versions import check_version
from visar.families.registry import register_family
from visar.families.source import Source
from visar.kernels.derived import Derived
from visar.params import SamplingParams

Grid = tuple[int, int]  # rows and columns
CELL = 32  # pixels of a code
DRAFT = 16  # rows and columns of the draft of a square image
SIZE = (1024, 1024)  # height and width where none is given, as in the pipeline of diffusers
ENCODER = "vision_language_encoder"  # the folder of the decoder


def draft_of(grid: Grid) -> Grid:
    """Rows and columns of the draft of an image, rounded down as `GlmImageProcessor` does."""
    ratio = grid[0] / grid[1]
    return int(math.sqrt(ratio) * DRAFT), int(math.sqrt(1 / ratio) * DRAFT)


def offsets_of(grids: Sequence[Grid]) -> Tensor:
    """Rotary positions [3, N] of the tokens of grids, counted from the end of the prompt."""
    parts, begin = [], 0
    for rows, columns in grids:
        cell = torch.arange(rows * columns)
        parts.append(begin + torch.stack([torch.zeros_like(cell), cell // columns, cell % columns]))
        begin += max(rows, columns)
    return torch.cat(parts, dim=1)


class GlmDecoder(VocabularyDecoder):
    """The codes are the first ids; the others, which end an image or mean nothing, are never sampled.

    A session of the decoder is for images of these `grids`.
    """

    def __init__(self, model: Any, codes: int, grids: Sequence[Grid]):
        super().__init__(model, range(codes))
        self.offsets = offsets_of(grids)

    def start(self) -> None:
        super().start()
        self.offsets = self.offsets.to(self.device)

    def position_ids(self, at: Tensor, prefix: Tensor) -> Tensor:
        node = at - prefix[:, None]
        found = prefix[:, None] + self.offsets[:, node.clamp(0, self.offsets.shape[1] - 1)]  # [3, rows, W]
        return torch.where(node < 0, at, found)


@register_family
class GlmImageFamily(TransformersFamily):
    """GLM-Image in the layout of zai-org/GLM-Image, or its decoder alone.

    It is for images of one `size`, height and width in pixels; `sized` gives it for another. `drawing` are arguments of
    the pipeline that makes pixels. Raises `VisarError` for a size off the grid.
    """

    name = "glm-image"
    model_type = "glm_image"
    architecture = "GlmImageForConditionalGeneration"
    sizes = as_configured = True
    guided = False

    def __init__(self, model: Any, processor: Any, draw: GlmPixels | None = None, size: tuple[int, int] = SIZE):
        self.draw, self._size = GlmPixels() if draw is None else draw, size
        super().__init__(model, processor)

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return source.pipeline == "GlmImagePipeline" or super().recognises(source)

    @classmethod
    def load(cls, source: Source) -> Self:
        assert source.folder is not None
        check_version()
        whole = source.pipeline == "GlmImagePipeline"
        model = load_model(cls.architecture, source.folder / ENCODER if whole else source.folder)
        processor = load_processor(source.folder / "processor" if whole else source.folder)
        return cls(model, processor, GlmPixels(folder=source.folder if whole else None), source.size or SIZE)

    @classmethod
    def wraps(cls, model: Any) -> bool:
        return super().wraps(model) or type(model).__name__ == "GlmImagePipeline"

    @classmethod
    def around(cls, model: Any, processor: Any) -> Self:
        if super().wraps(model):
            return super().around(model, processor)
        if processor is not None:
            raise VisarError("A GlmImagePipeline has its processor; give the pipeline alone.")
        return cls(model.vision_language_encoder, model.processor, GlmPixels(model))

    def in_place_of(self, model: Any, pipeline: Any) -> Any:
        return pipeline if super().wraps(model) else faster_pipeline(model, pipeline)

    def made(self) -> None:
        model, config = self.model, self.model.config
        height, width = self._size
        if height % CELL or width % CELL or min(height, width) < CELL:
            raise VisarError(f"Height and width of GLM-Image are multiples of {CELL} pixels, not {height} and {width}.")
        self.grid = height // CELL, width // CELL
        self.draft = draft_of(self.grid)
        if not all(self.draft):
            raise VisarError(f"An image of {width} x {height} pixels is too narrow for the draft of GLM-Image.")
        codes = int(config.vq_config.num_embeddings)
        self.layout = Layout(*self.grid, lead=math.prod(self.draft))
        if self.layout.length >= (context := VocabularyDecoder(model, range(codes)).context):
            raise VisarError(  # before each position is written down
                f"An image of {width} x {height} pixels has {self.layout.length} tokens; this model has room for "
                f"{context} with the prompt's."
            )
        self.decoder = GlmDecoder(model, codes, (self.draft, self.grid))
        self.defaults = SamplingParams(
            guidance_scale=1.0, guidance_interval=-1, guidance_schedule="constant", temperature=0.9, top_k=0, top_p=0.75
        )

    def sized(self, height: int | None = None, width: int | None = None) -> Self:
        size = (self._size[0] if height is None else height, self._size[1] if width is None else width)
        if size == self._size:
            return self
        return type(self)(self.model, self.processor, self.draw, size)

    def replace(self, name: str, component: Any) -> None:
        made = type(self)(component, self.processor, self.draw, self._size)
        vars(self).clear()
        vars(self).update(vars(made))

    # Prompts

    def prompt_ids(self, text: str) -> tuple[list[int], list[int]]:
        message = {"role": "user", "content": [{"type": "text", "text": text}]}
        size: dict[str, Any] = {"target_h": self._size[0], "target_w": self._size[1]}
        if not getattr(self.processor, "chat_template", None) or not hasattr(self.processor, "image_token"):
            raise VisarError("The processor of this GLM-Image has no chat template; give the GlmImageProcessor.")
        if self.processor.image_token in text:
            raise VisarError(SPECIAL)
        if "processor_kwargs" in inspect.signature(self.processor.apply_chat_template).parameters:
            size = {"processor_kwargs": size}
        made = self.processor.apply_chat_template(
            [message], tokenize=True, return_dict=True, return_tensors="pt", **size
        )
        ids: list[int] = made["input_ids"][0].tolist()
        grids = [tuple(grid) for grid in made.get("image_grid_thw", torch.empty(0)).tolist()]
        config = self.model.config
        begin, end, cell = config.image_start_token_id, config.image_end_token_id, config.image_token_id
        if grids != [(1, *self.grid), (1, *self.draft)] or ids[-1] != begin:
            raise VisarError("The processor of this GLM-Image writes prompts in another way than that of transformers.")
        if ids.count(begin) != 1 or end in ids or cell in ids:
            raise VisarError(SPECIAL)
        return ids, []

    # Pixels

    @property
    def pixels(self) -> tuple[int, int]:
        return self._size

    @property
    def codebook(self) -> Tensor:
        return F.normalize(self.model.model.vqmodel.quantize.embedding.weight, dim=-1)

    def prior_token_ids(self, tokens: Tensor) -> Tensor:
        """What `GlmImagePipeline` takes, [B, 4 * rows * columns]: the codes of the image, each twice in both ways."""
        cells = self.layout.cells(tokens)
        return cells.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)

    def check_decoding(self) -> None:
        self.draw.check()

    def decode(self, tokens: Tensor) -> Tensor:
        return self.decode_for([""] * len(tokens), tokens)

    def decode_for(self, conditions: Sequence[Any], tokens: Tensor) -> Tensor:
        return self.draw(self, list(conditions), tokens)

    def preview(self, tokens: Tensor) -> Tensor:
        """False colours: codes that are alike have colours that are alike."""
        colours = _colours.of([self.model.model.vqmodel.quantize.embedding.weight], lambda: colours_of(self.codebook))
        return colours[self.layout.cells(tokens).cpu()].permute(0, 3, 1, 2)


_colours: Derived[Tensor] = Derived()


def colours_of(codebook: Tensor) -> Tensor:
    """Three numbers in [0, 1] for each code [V, 3], by the directions in which codes differ most."""
    book = codebook.float().cpu()
    found = book @ torch.linalg.eigh(book.T @ book).eigenvectors[:, -3:]
    low, high = found.quantile(0.01, 0), found.quantile(0.99, 0)
    return ((found - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
