"""Orders in which a masked model samples the cells of an image: such that cells of one pass are far from each other.

The model samples the tokens of a pass independently of one another, which hurts most between neighbours. MAR's own
order is random. Another one gives another distribution: it is relaxed against the random order.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from visar.engine.masked_session import MaskedSession
from visar.errors import VisarError

# random: MAR's. halton: the Halton sequence of bases 2 and 3 (Besnier et al. 2025, arXiv:2503.17076). dilated: lattices
# of cells, from coarse to fine, each in a random order (after Luxembourg et al. 2025, arXiv:2506.19037). gtr: every
# other cell as on a checkerboard, spread by bisection, and then the rest (GtR, Yan et al. 2025, arXiv:2510.17171).
Order = Literal["random", "halton", "dilated", "gtr"]


def arrange(session: MaskedSession, order: Order) -> Tensor:
    """The order [B, N] of a session, whose own is random: tokens that are given stay first.

    Each image begins where its random order would, and the rest is shifted with it, round the edges. Raises
    `VisarError` for a session without a layout.
    """
    if order == "random":
        return session.order
    if session.layout is None:
        raise VisarError(f"order {order!r} needs a session with a layout, the rows and columns of the image.")
    rows, columns = session.layout.rows, session.layout.columns
    known, free = session.order.split([session.given, session.length - session.given], dim=1)
    turn = torch.tensor(TURNS[order](rows, columns), device=session.device)
    first, begin = turn.argmin(), free[:, :1]
    down = (free // columns - begin // columns + first // columns) % rows
    right = (free % columns - begin % columns + first % columns) % columns
    return torch.cat([known, free.gather(1, turn[down * columns + right].argsort(dim=1, stable=True))], dim=1)


@cache
def halton(rows: int, columns: int) -> list[int]:
    """The turn of each cell, [rows * columns] in raster order."""
    turn: dict[int, int] = {}
    n = 0
    while len(turn) < rows * columns:
        turn.setdefault(int(_inverse(n, 2) * rows) * columns + int(_inverse(n, 3) * columns), len(turn))
        n += 1
    return [turn[cell] for cell in range(rows * columns)]


def _inverse(n: int, base: int) -> float:
    """The digits of n behind the point, in the opposite order (van der Corput)."""
    value, place = 0.0, 1.0
    while n:
        n, digit = divmod(n, base)
        place /= base
        value += digit * place
    return value


@cache
def dilated(rows: int, columns: int) -> list[int]:
    """The turn of each cell's lattice: of spacing s, then the cells between, diagonal ones first, then of s / 2."""

    def turn(row: int, column: int) -> int:
        for bit in range(max(rows, columns).bit_length()):
            i, j = row >> bit & 1, column >> bit & 1
            if i or j:  # a cell of the lattice of spacing 2**bit and of no coarser one
                return 4 * (max(rows, columns).bit_length() - bit) + (1 if i and j else 2 + j)
        return 0

    return [turn(row, column) for row in range(rows) for column in range(columns)]


@cache
def checkerboard(rows: int, columns: int) -> list[int]:
    """The turn of each cell, the entry of Bayer's matrix: every half of the cells is a checkerboard of the rest."""

    def turn(row: int, column: int) -> int:
        value = 0
        for bit in range((max(rows, columns) - 1).bit_length()):
            i, j = row >> bit & 1, column >> bit & 1
            value = value << 2 | (i ^ j) << 1 | i
        return value

    return [turn(row, column) for row in range(rows) for column in range(columns)]


TURNS = {"halton": halton, "dilated": dilated, "gtr": checkerboard}
