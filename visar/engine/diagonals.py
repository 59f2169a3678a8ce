"""The anti-diagonals of an image: the cells of one are sampled together, each from its left and its upper neighbour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from visar.engine.layout import Layout


class Neighbours(NamedTuple):
    """For cells [...]: the index of the input `left` of each and of the one `above`, and whether there is one."""

    left: Tensor
    above: Tensor
    has_left: Tensor
    has_above: Tensor


@dataclass(frozen=True)
class Diagonals:
    """The D = rows + columns - 1 diagonals of a layout, each of at most W cells from top to bottom; 0 is the corner.

    `cells` [D + 1, W] are positions, N where a diagonal has fewer; the last row is what follows the last diagonal.
    `neighbours` [D + 1, W] point into the diagonal before; the corner's are the condition, the only input of its pass.
    `of_length` [N + 1] is the diagonal to sample next after so many tokens, and `count` [D + 1] its number of cells.
    `when` [N] is the diagonal of each position.
    """

    cells: Tensor
    neighbours: Neighbours
    of_length: Tensor
    count: Tensor
    when: Tensor

    @classmethod
    def of(cls, layout: Layout, device: torch.device | str = "cpu") -> Diagonals:
        rows, columns, number = layout.rows, layout.columns, width_of(layout)
        d = torch.arange(rows + columns)[:, None]
        top = (d - columns + 1).clamp_min(0)
        row = top + torch.arange(number)
        column = d - row
        inside = (row < rows) & (column >= 0)
        before = (d - 1 - columns + 1).clamp_min(0)  # the top row of the diagonal before
        corner = d == 0
        left, above = row - before, row - 1 - before
        has_left, has_above = (column > 0) | corner, (row > 0) | corner
        left, above = (x.masked_fill(corner, 0).clamp(0, number - 1) for x in (left, above))
        count = inside.sum(1)
        starts = count.cumsum(0) - count
        of_length = torch.searchsorted(starts, torch.arange(layout.length + 1), right=True) - 1
        cell = torch.arange(layout.length)
        made = cls(
            torch.where(inside, row * columns + column, layout.length),
            Neighbours(left, above, has_left, has_above),
            of_length,
            count,
            cell // columns + cell % columns,
        )
        moved = [t.to(device) for t in (made.cells, *made.neighbours, made.of_length, made.count, made.when)]
        return cls(moved[0], Neighbours(*moved[1:5]), *moved[5:])


def width_of(layout: Layout) -> int:
    """Cells of the longest diagonal."""
    return min(layout.rows, layout.columns)


def whole(grid: int, device: torch.device | str = "cpu") -> Neighbours:
    """The neighbours of all cells [N] of a square, in raster order, where the inputs are the condition's last slot and
    then the tokens."""
    cell = torch.arange(grid * grid, device=device)
    has_left, has_above = cell % grid > 0, cell >= grid
    above = (cell + 1 - grid).clamp_min(0)
    corner = cell == 0
    return Neighbours(torch.where(has_left, cell, 0), above, has_left | corner, has_above | corner)
