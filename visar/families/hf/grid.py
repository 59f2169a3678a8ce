"""Families whose images are codes of the vocabulary in rows, each ended by a token, such as Emu3 and Emu3.5."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from visar.engine.layout import Layout
from visar.errors import VisarError
from visar.families.hf.base import TransformersFamily
from visar.families.hf.decoder import VocabularyDecoder


class GridDecoder(VocabularyDecoder):
    """The `codes` of images, and after them the one token that ends a row, the id `line_end`.

    It stands where it is forced and nowhere else, so the output head runs without it: its logit is 0, and the family
    does not allow it. Codes that follow one another are thus a view of the head, however far away `line_end` is.
    """

    def __init__(self, model: Any, codes: Sequence[int], line_end: int):
        super().__init__(model, codes)
        self.line_end, self.vocab = line_end, len(self.codes) + 1

    def embed(self, tokens: Tensor) -> Tensor:
        ids = self.codes[tokens.clamp_max(self.vocab - 2)]
        return self.embed_prompt(torch.where(tokens < self.vocab - 1, ids, self.line_end))

    def head(self, hidden: Tensor) -> Tensor:
        return F.pad(super().head(hidden), (0, 1))


def cells_of(size: tuple[int, int], cell: int) -> tuple[int, int]:
    """Rows and columns of an image of a `size`, height and width. Raises `VisarError` for one off the grid."""
    height, width = size
    if min(size) < cell or height % cell or width % cell:
        raise VisarError(f"Height and width of this model are multiples of {cell} pixels, not {height} and {width}.")
    return height // cell, width // cell


class GridFamily(TransformersFamily):
    """Images of `rows` x `columns` codes, whose tokens are the decoder's. What follows the last row is the same in
    every image, so it is not decoded: `tail` are its ids, the first of which stands for the last token."""

    sizes = True

    decoder: GridDecoder
    tail: tuple[int, ...]

    def set_grid(self, decoder: GridDecoder, rows: int, columns: int, tail: Sequence[int]) -> None:
        """Raises `VisarError` for an image for which the model has too few positions."""
        self.decoder, self.layout, self.tail = decoder, Layout(rows, columns, line_end=True), tuple(tail)
        if self.room < 1:
            raise VisarError(
                f"An image of {rows} x {columns} cells is {self.layout.length} tokens, and this model has "
                f"{decoder.context} positions for them and the prompt."
            )
        at = torch.arange(self.layout.length, device=decoder.device)
        self.forced = torch.where((at + 1) % self.layout.stride == 0, decoder.vocab - 1, -1)
        self.allowed = torch.arange(decoder.vocab, device=decoder.device) < decoder.vocab - 1

    def ids(self, tokens: Tensor) -> Tensor:
        """The ids [B, n] that the stock `generate` gives, all those after the prompt, for tokens [B, N]."""
        ids = F.pad(self.decoder.codes, (0, 1), value=self.decoder.line_end).to(tokens.device)[tokens]
        return torch.cat([ids[:, :-1], ids.new_tensor(self.tail).expand(len(ids), -1)], dim=1)

    @property
    def codebook(self) -> Tensor:
        """[V, D]; the row of the token that ends a row is 0, and like no code."""
        return F.pad(self.codes_of_images, (0, 0, 0, 1))

    @property
    @abstractmethod
    def codes_of_images(self) -> Tensor:
        """The vectors of the codes, [codes, D]."""

    @property
    @abstractmethod
    def cell(self) -> int:
        """Pixels of a cell along one side."""

    @abstractmethod
    def of_size(self, size: tuple[int, int]) -> Self:
        """The same model for images of another size."""

    def sized(self, height: int | None = None, width: int | None = None) -> Self:
        size = (self.pixels[0] if height is None else height, self.pixels[1] if width is None else width)
        return self if size == self.pixels else self.of_size(size)

    @property
    def pixels(self) -> tuple[int, int]:
        return self.layout.rows * self.cell, self.layout.columns * self.cell
