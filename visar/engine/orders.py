"""Orders in which the cells of an image are sampled: such that cells that are sampled together are far from each other.

A masked model samples the tokens of a pass independently of one another, which hurts most between neighbours. MAR's own
order is random; another one gives another distribution: it is relaxed against the random order. A model that was
trained for any order (RandAR) has a distribution for each, and in a window of drafts far cells change one another
least.

halton: the Halton sequence of bases 2 and 3 (Besnier et al. 2025, arXiv:2503.17076). dilated: lattices of cells, from
coarse to fine, each in a random order (after Luxembourg et al. 2025, arXiv:2506.19037). gtr: every other cell as on a
checkerboard, spread by bisection, and then the rest (GtR, Yan et al. 2025, arXiv:2510.17171).
"""

from __future__ import annotations

import math
from functools import cache
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from visar.engine.layout import Layout
from visar.engine.masked_session import MaskedSession
from visar.engine.rng import Noise, Purpose
from visar.errors import VisarError

REPULSION, PROXIMITY = 2, 1.0  # of LPD


def random_orders(noise: Noise, length: int, given: Tensor | None = None) -> Tensor:
    """A random order [B, N] of each row's positions, those marked in `given` [N] first."""
    positions = torch.arange(length, device=noise.images.device)
    chances = noise.uniforms(Purpose.ORDER, positions.expand(len(noise.images), -1), 0)[0]
    return (chances if given is None else chances - given.double()).argsort(1)


def orders_of(name: str, layout: Layout, noise: Noise) -> Tensor:
    """The cells [B, N] of an image by their turn, for an order of `visar.params.ORDERS`; a random one is each row's
    own."""
    if name == "random":
        return random_orders(noise, layout.length)
    turn = list(range(layout.length)) if name == "raster" else TURNS[name](layout.rows, layout.columns)
    return torch.tensor(turn, device=noise.images.device).argsort(stable=True).expand(len(noise.images), -1)


def arrange(session: MaskedSession, order: str) -> Tensor:
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


@cache
def farthest_point(rows: int, columns: int) -> list[int]:
    """The turn of each cell: from the first corner on, the one that is farthest from all before it (Gonzalez 1985).

    Of equal ones it is the first in the order of Halton, so that those of one distance are not next to each other.
    """
    apart, spread = _distances(rows, columns)[0], np.array(halton(rows, columns))
    turn, least = [0] * len(apart), np.full(len(apart), np.inf)
    for n in range(len(apart)):
        cell = int(np.where(least == least.max(), -spread, -len(apart)).argmax())
        turn[cell] = n
        least = np.minimum(least, apart[cell])
        least[cell] = -1
    return turn


def group_sizes(number: int, groups: int) -> list[int]:
    """The sizes of `groups` of `number` cells, fewer if there are fewer cells: growing by a cosine, as LPD has them.

    Each is rounded, and at least 1; the last ones make up for it.
    """
    groups = min(groups, number)
    ends = [number * (1 - math.cos(math.pi / 2 * n / groups)) for n in range(groups + 1)]
    sizes = [max(1, round(after - before)) for before, after in pairwise(ends)]
    while (over := sum(sizes) - number) != 0:
        for n in range(1, 1 + min(abs(over), groups)):
            sizes[-n] -= 1 if over > 0 and sizes[-n] > 1 else -1 if over < 0 else 0
    return sorted(sizes)


@cache
def locality(rows: int, columns: int) -> list[int]:
    """The turn of each cell by the schedule of LPD (Zhang et al. 2025, arXiv:2507.01957), one group after the other.

    There are 1.25 sqrt(N) groups (`group_sizes`): the authors' 20 of a side of 16. A group takes cells that are near to
    known ones (the sum of 1 / distance of the known among their eight neighbours is `PROXIMITY` or more), the nearest
    first, and none within `REPULSION` of another of the group; if they are too few, it is filled with the cells that
    are farthest from it. LPD shuffles before it sorts: here equal cells come in the order of Halton, so that there is
    one schedule.
    """
    apart, steps = _distances(rows, columns)
    number = rows * columns
    weight = np.divide(1, apart, out=np.zeros_like(apart), where=(steps == 1))
    spread, order = np.array(halton(rows, columns)), list[int]()
    for end in accumulate(group_sizes(number, max(1, round(1.25 * math.sqrt(number))))):
        near, own = weight[:, order].sum(1), list[int]()
        free = np.ones(number, dtype=bool)
        free[order] = False
        for cell in sorted(np.flatnonzero(free & (near >= PROXIMITY)), key=lambda c: (-near[c], spread[c])):
            if len(order) + len(own) < end and (not own or steps[cell, own].min() > REPULSION):
                own.append(int(cell))
        free[own] = False
        while len(order) + len(own) < end:
            least = apart[:, own].min(1) if own else -spread.astype(float)
            own.append(int(np.where(free, least, -np.inf).argmax()))
            free[own] = False
        order += own
    return np.argsort(order).tolist()  # type: ignore[no-any-return]


def _distances(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Between all cells, [N, N] each: Euclidean ones, and by the larger of rows and columns."""
    cells = np.stack(np.divmod(np.arange(rows * columns), columns), 1)
    across = np.abs(cells[:, None] - cells)
    return np.sqrt((across**2).sum(-1)), across.max(-1)


TURNS = {
    "halton": halton, "dilated": dilated, "gtr": checkerboard, "farthest-point": farthest_point, "locality": locality,
}  # fmt: skip
