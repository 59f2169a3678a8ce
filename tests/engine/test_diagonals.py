"""The tables of anti-diagonals, against loops over rows and columns."""

from __future__ import annotations

import pytest
import torch

from visar.engine.diagonals import Diagonals, whole, width_of
from visar.engine.layout import Layout


@pytest.mark.parametrize("layout", [Layout(4, 4), Layout(1, 1), Layout(2, 5), Layout(5, 2), Layout(1, 6), Layout(6, 1)])
def test_cells_and_neighbours_of_every_diagonal(layout: Layout) -> None:
    rows, columns, length = layout.rows, layout.columns, layout.length
    table, done = Diagonals.of(layout), 0
    assert table.cells.shape == (rows + columns, width_of(layout)) and len(table.of_length) == length + 1
    for d in range(rows + columns - 1):
        cells = [(r, d - r) for r in range(rows) if 0 <= d - r < columns]
        before = [(r, d - 1 - r) for r in range(rows) if 0 <= d - 1 - r < columns]
        assert int(table.of_length[done]) == d and int(table.count[d]) == len(cells)
        assert table.cells[d].tolist() == [r * columns + c for r, c in cells] + [length] * (
            width_of(layout) - len(cells)
        )
        for i, (r, c) in enumerate(cells):
            left, above, has_left, has_above = (part[d, i].item() for part in table.neighbours)
            assert int(table.when[r * columns + c]) == d
            if d == 0:  # the corner is predicted from the condition, the only input, by both heads
                assert (left, above, has_left, has_above) == (0, 0, True, True)
                continue
            assert (has_left, has_above) == (c > 0, r > 0)
            assert not has_left or before[left] == (r, c - 1)
            assert not has_above or before[above] == (r - 1, c)
        done += len(cells)
    end = int(table.of_length[length])
    assert done == length and int(table.count[end]) == 0 and bool((table.cells[end] == length).all())


def test_neighbours_in_raster_order() -> None:
    side, at = 4, whole(4)
    for cell in range(side * side):  # input 0 is the condition, input n + 1 the token n
        r, c = divmod(cell, side)
        assert bool(at.has_left[cell]) == (c > 0 or cell == 0) and bool(at.has_above[cell]) == (r > 0 or cell == 0)
        assert c == 0 or int(at.left[cell]) == cell
        assert r == 0 or int(at.above[cell]) == cell - side + 1
    assert int(at.left[0]) == int(at.above[0]) == 0
    assert all(bool(((x >= 0) & (x < side * side)).all()) for x in at[:2])


def test_device() -> None:
    assert Diagonals.of(Layout(2, 2), "meta").cells.device == torch.device("meta")
