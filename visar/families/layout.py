"""How the tokens of an image lie in its sequence: cells in raster order, perhaps with a token at each row's end."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """`rows` x `columns` cells, each one token; with `line_end` a token that is no cell follows every row."""

    rows: int
    columns: int
    line_end: bool = False

    @property
    def length(self) -> int:
        """Tokens of an image, N."""
        return self.rows * self.stride

    @property
    def stride(self) -> int:
        """Tokens from a cell to the one below it."""
        return self.columns + int(self.line_end)

    def cells(self, tokens: Tensor) -> Tensor:
        """[B, rows, columns, ...] of something [B, N, ...] that is given for each token."""
        return tokens.unflatten(1, (self.rows, self.stride))[:, :, : self.columns]
