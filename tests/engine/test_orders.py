"""Orders of cells: permutations that keep what is given first, and cells of one pass or window that are far apart."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from tests.helpers.plain_mar import N, tiny
from visar.engine.layout import Layout
from visar.engine.loop import decode
from visar.engine.orders import arrange, orders_of
from visar.engine.rng import Noise
from visar.errors import VisarError
from visar.families.mar.session import MARSession
from visar.params import ORDERS
from visar.samplers import get_sampler
from visar.samplers.masked import ContinuousTarget, MaskedAutoregressive, Order, two_stages


def session_of(rows: int, columns: int, given: int = 0, batch: int = 3) -> Any:
    """What `arrange` reads of a session, with random orders."""
    g = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(rows * columns, generator=g) for _ in range(batch)])

    class Bare:
        layout: Layout | None = Layout(rows, columns)
        length, device = rows * columns, torch.device("cpu")

    bare = Bare()
    bare.order, bare.given = order, given  # type: ignore[attr-defined]
    return bare


def spacing(cells: Tensor, rows: int, columns: int) -> int:
    """The least distance of two cells, by the larger of rows and columns, round the edges."""
    down, right = (c[:, None] - c for c in (cells // columns, cells % columns))
    apart = torch.maximum(*(torch.minimum(d % n, -d % n) for d, n in ((down, rows), (right, columns))))
    return int((apart + rows * torch.eye(len(cells), dtype=torch.long)).min())


@pytest.mark.parametrize("order", get_args(Order)[1:])
@pytest.mark.parametrize(("rows", "columns", "given"), [(8, 8, 0), (8, 8, 5), (3, 7, 2), (1, 6, 0)])
def test_an_order_is_a_permutation_that_begins_where_the_random_one_does(
    order: Order, rows: int, columns: int, given: int
) -> None:
    session = session_of(rows, columns, given)
    found = arrange(session, order)
    assert torch.equal(found.sort(1).values, torch.arange(rows * columns).expand(3, -1))
    assert torch.equal(found[:, : given + 1], session.order[:, : given + 1])
    assert not torch.equal(found, session.order) and not torch.equal(found[0], found[1])
    assert torch.equal(arrange(session, "random"), session.order)


def test_cells_of_a_pass_are_far_apart() -> None:
    gtr, halton, dilated, random = (
        arrange(session_of(8, 8), name)  # type: ignore[arg-type]
        for name in ("gtr", "halton", "dilated", "random")
    )
    for row in gtr:
        odd = (row // 8 + row % 8) % 2
        assert len(odd[:32].unique()) == 1 and len(odd[32:].unique()) == 1  # a checkerboard, then the other
        assert spacing(row[:4], 8, 8) == 4 and spacing(row[:16], 8, 8) == 2
    assert all(spacing(row[:4], 8, 8) == 4 and spacing(row[:16], 8, 8) == 2 for row in dilated)
    assert all(spacing(row[16:32], 8, 8) == 2 and spacing(row[32:48], 8, 8) == 2 for row in dilated)
    assert all(spacing(row[:6], 8, 8) == 2 for row in halton)
    assert not all(spacing(row[:6], 8, 8) == 2 for row in random)
    assert len({tuple(row[16:32].tolist()) for row in dilated}) == 3


def test_two_stages() -> None:
    assert two_stages(256, 9) == [(16, 16 * i) for i in range(1, 9)] + [(128, 255)]
    assert two_stages(7, 2) == [(4, 4), (3, 6)]
    for length in (2, 9, 64):
        for passes in range(2, -(-length // 2) + 2):
            plan = two_stages(length, passes)
            assert len(plan) == passes and sum(n for n, _ in plan) == length and min(n for n, _ in plan) > 0
        with pytest.raises(VisarError, match=f"gtr {length} tokens are sampled in 2 to {passes} passes, not 1"):
            two_stages(length, 1)


@pytest.mark.parametrize("order", ["halton", "dilated"])
def test_the_sampler_is_plain_decoding_in_that_order(order: Order) -> None:
    def session() -> MARSession:
        made = MARSession(tiny(), torch.tensor([1, 2, 3]), torch.stack([torch.arange(N).roll(i) for i in range(3)]))
        made.layout = Layout(3, N // 3)
        return made

    target, noise, few = ContinuousTarget(), Noise(5, torch.arange(3)), {"steps": 4, "head_steps": 6}
    by_hand = session()
    by_hand.order = arrange(by_hand, order)
    expected = decode(by_hand, MaskedAutoregressive(**few), target, noise)
    found, plain = (decode(session(), MaskedAutoregressive(**few, order=o), target, noise) for o in (order, "random"))
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.commit_pass, expected.commit_pass)
    assert not torch.equal(found.commit_pass, plain.commit_pass)


def test_only_the_random_order_is_exact() -> None:
    assert get_sampler("mar", order="random").exact
    assert not any(get_sampler(name, order="halton").exact for name in ("mar", "mar-headspec"))
    assert get_sampler("mar-gtr").order == "gtr" and not get_sampler("mar-gtr").exact


def test_bad_orders() -> None:
    with pytest.raises(VisarError, match="Unknown order 'raster'; known: random, halton, dilated, gtr"):
        get_sampler("mar", order="raster")
    bare = session_of(2, 2)
    bare.layout = None
    with pytest.raises(VisarError, match="'halton' needs a session with a layout"):
        arrange(bare, "halton")


def cells_of(name: str, rows: int, columns: int, seed: int = 0, batch: int = 2) -> Tensor:
    return orders_of(name, Layout(rows, columns), Noise(seed, torch.arange(batch)))


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (3, 7), (1, 6), (1, 1), (16, 16)])
@pytest.mark.parametrize("name", ORDERS)
def test_named_orders_are_permutations(name: str, rows: int, columns: int) -> None:
    found = cells_of(name, rows, columns)
    assert torch.equal(found.sort(1).values, torch.arange(rows * columns).expand(2, -1))
    if name == "random" and rows * columns > 1:  # of the seed and the image
        assert torch.equal(found, cells_of(name, rows, columns)) and not torch.equal(found[0], found[1])
        assert not torch.equal(found, cells_of(name, rows, columns, seed=1))
    else:
        assert torch.equal(found[0], found[1])


def test_cells_of_a_window_are_far_apart() -> None:
    """The mean distance of the cells that follow one another in a window of 16, on 16 x 16 cells."""

    def apart(name: str) -> float:
        order = cells_of(name, 16, 16)[0]
        at = torch.stack([order // 16, order % 16], 1).double().unfold(0, 16, 1).transpose(1, 2)
        return float((torch.cdist(at, at) + 99 * torch.eye(16)).amin(-1).mean())

    raster, random, locality, halton, farthest = map(
        apart, ("raster", "random", "locality", "halton", "farthest-point")
    )

    assert raster < 1.01 < random < min(locality, halton, farthest)
    first = cells_of("farthest-point", 16, 16)[0]
    assert first[:4].tolist() == [0, 255, 240, 15]


def test_locality_is_near_to_what_is_known_and_far_within_a_group() -> None:
    order = cells_of("locality", 16, 16)[0]
    at, ends = torch.stack([order // 16, order % 16], 1).double(), [12, 19, 27, 37, 48, 60]  # LPD's groups
    for begin, end in itertools.pairwise(ends):
        within, known = (torch.cdist(at[begin:end], other, p=torch.inf) for other in (at[begin:end], at[:begin]))
        assert (within.fill_diagonal_(9).amin(1) > 1).all() and (known.amin(1) < 2).float().mean() > 0.5
