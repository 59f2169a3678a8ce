"""The order of an image's tokens: cells in raster order, for some models with a token at the end of each row."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """`rows` x `columns` cells, each one token; with `line_end` one more token, which is no cell, follows each row.

    `lead` tokens, which are no cells either, come before the first row.
    """

    rows: int
    columns: int
    line_end: bool = False
    lead: int = 0

    @property
    def length(self) -> int:
        """Tokens of an image, N."""
        return self.lead + self.rows * self.stride

    @property
    def stride(self) -> int:
        """Tokens from a cell to the one below it."""
        return self.columns + int(self.line_end)

    def cells(self, tokens: Tensor) -> Tensor:
        """[B, rows, columns, ...] for one value per token, [B, N, ...]."""
        return tokens[:, self.lead :].unflatten(1, (self.rows, self.stride))[:, :, : self.columns]
