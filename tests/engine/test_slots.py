"""Slots against decoding alone: rows that come late and with settings of their own, cancelled, failed, and captured."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.helpers.recording import Recorder
from tests.helpers.worlds import LARGE, made, session_of, world
from visar.drafters.eagle import EagleDrafter
from visar.engine.cached_session import CachedSession
from visar.engine.guidance import Guidance, RowGuidance
from visar.engine.kv_cache import KVCache
from visar.engine.loop import decode
from visar.engine.rng import Noise
from visar.engine.session import Session
from visar.engine.slots import Row, Slots
from visar.samplers import RowTargets, Target, samplers_for

NAMES = [n for n, spec in samplers_for("discrete").items() if not getattr(spec.make(), "lockstep", False)]
SHORT = {False: ("ar", "scd", "speculative", "eagle2", "hydra", "specdec++"), True: ("scd-gumbel", "eagle2")}
ROWS = 3
# Each also as a graph, but for those whose host looks at the device.
CASES = [
    pytest.param(name, graphs, marks=() if name in SHORT[graphs] else pytest.mark.slow)
    for name in NAMES
    for graphs in ((False, True) if getattr(made(name), "capturable", True) else (False,))
]


class Request(NamedTuple):
    image: Tensor  # [1]: its index, which stands for its condition
    target: Target
    guidance: Guidance
    seed: int


def requests(count: int, seed: int = 0) -> list[Request]:
    """Of all kinds of settings; some have no guidance, and one no setting at all."""
    g = random.Random(seed)
    forced = torch.full((16,), -1)
    forced[[0, 5, 6]] = torch.tensor([3, 9, 60])
    out = [Request(torch.tensor([0]), Target(), Guidance(2.0), 11)]
    for i in range(1, count):
        target = Target(
            g.choice([0.7, 1.0, 1.4]), g.choice([0, 5, 30]), g.choice([0.8, 1.0]), forced if i % 4 == 0 else None
        )
        guidance = Guidance(g.choice([1.0, 1.7, 3.0]), g.choice([-1, -1, 4]))
        out.append(Request(torch.tensor([i]), target, guidance, g.choice([0, 5, 2**63 + 1])))
    return out


def fresh(sampler: Any, request: Request, pool: bool) -> Session:
    """A session of one row; in a pool both batches run, whatever the guidance."""
    guidance = RowGuidance(1, torch.device("cpu")) if pool else request.guidance
    return session_of(world("text", **LARGE), sampler, request.image, guidance=guidance)


def alone(sampler: Any, request: Request) -> Row:
    out = decode(fresh(sampler, request, False), sampler, request.target, Noise(request.seed, request.image))
    return Row(out.tokens[0], out.commit_pass[0])


class Pool:
    """Slots with what admission needs."""

    def __init__(self, sampler: Any, made_of: type[Slots] = Slots, **options: Any):
        self.sampler, images = sampler, torch.zeros(ROWS, dtype=torch.long)
        guidance = RowGuidance(ROWS, torch.device("cpu"))
        session = session_of(world("text", **LARGE), sampler, images, guidance=guidance)
        targets = RowTargets(ROWS, 16, torch.device("cpu"))
        self.slots = made_of(session, sampler, targets, Noise(0, images), **options)

    def admit(self, row: int, request: Request) -> None:
        noise = Noise(request.seed, request.image)
        self.slots.admit(row, fresh(self.sampler, request, True), request.target, request.guidance, noise)

    def run(self, waiting: list[Request], each: Callable[[dict[int, Request]], None] = lambda rows: None) -> list[Row]:
        """All requests, which come at random times; the rows by image."""
        g, rows, found = random.Random(1), dict[int, Request](), dict[int, Row]()
        queue = list(waiting)
        while queue or rows:
            while queue and self.slots.free and (not rows or g.random() < 0.4):
                row = g.choice(sorted(self.slots.free))
                rows[row] = queue.pop(0)
                self.admit(row, rows[row])
            done, failed = self.slots.step()
            assert not failed
            for row in done:
                found[int(rows.pop(row).image)] = self.slots.read(row)
                self.slots.release(row)
            each(rows)
        return [found[int(request.image)] for request in waiting if int(request.image) in found]


def same(found: list[Row], expected: list[Row]) -> bool:
    return all(torch.equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize(("name", "graphs"), CASES)
def test_a_request_is_what_it_would_be_alone(name: str, graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens in the same passes, counted from its admission."""
    sampler, asked = made(name), requests(7)
    expected = [alone(sampler, request) for request in asked]
    record = Recorder(monkeypatch) if graphs else None
    pool, widths = Pool(sampler, capture=record), set()
    assert same(pool.run(asked, lambda _: widths.add(pool.slots.session.batch)), expected)
    assert widths == ({ROWS} if graphs else {1, 2, 3})  # without a graph a pass has the rows of requests only
    assert record is None or record.captures <= 3  # once for each kind of limit


class PassesOfTheBatch(Slots):
    """Known bad: one count of passes for all rows."""

    def admit(self, slot: int, *args: Any) -> None:
        most = self.state.passes.max()
        super().admit(slot, *args)
        self.state.passes = torch.full_like(self.state.passes, int(most))


class SettingsOfThePool(Slots):
    """Known bad: the settings of whoever was there first."""

    def admit(self, slot: int, fresh: Session, target: Any, *args: Any) -> None:
        super().admit(slot, fresh, replace(target, temperature=1.0, top_k=0, top_p=1.0), *args)


class SeedOfThePool(Slots):
    """Known bad: one seed for all rows."""

    def admit(self, slot: int, *args: Any) -> None:
        args[-1].key.zero_()
        super().admit(slot, *args)


class StateOfTheRow(Slots):
    """Known bad: a row that moves leaves the sampler's state where it was."""

    def _select(self, rows: list[int]) -> None:
        before = {name: getattr(self.state, name) for name in self._own}
        super()._select(rows)
        for name, tensor in before.items():
            setattr(self.state, name, tensor[stays(torch.tensor(rows))])


@pytest.mark.parametrize("bad", [PassesOfTheBatch, SettingsOfThePool, SeedOfThePool, StateOfTheRow])
def test_known_bad_slots_are_caught(bad: type[Slots]) -> None:
    sampler, asked = made("scd"), requests(9)
    found = Pool(sampler, bad).run(asked)
    assert not same(found, [alone(sampler, request) for request in asked])


def stays(rows: Tensor) -> Tensor:
    """As many rows as are asked for, each where it was."""
    return torch.arange(len(rows)).clamp_max(int(rows.max()))


@pytest.mark.parametrize(
    ("owner", "name"),
    [(Noise, "of"), (RowTargets, "select"), (RowGuidance, "select"), (CachedSession, "_keep"), (EagleDrafter, "select"),
     (KVCache, "place")],
)  # fmt: skip
def test_what_does_not_move_with_its_row_is_caught(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known bad: noise, settings or caches of a row's number, and not of its image."""
    sampler, asked = made("eagle" if owner is EagleDrafter else "scd"), requests(9)
    expected, right = [alone(sampler, request) for request in asked], getattr(owner, name)
    if name == "place":
        monkeypatch.setattr(owner, name, lambda *_: None)
    else:
        monkeypatch.setattr(owner, name, lambda own, rows: right(own, stays(rows)))
    assert not same(Pool(sampler).run(asked), expected)


@pytest.mark.parametrize("name", ["ar", "scd", "eagle"])
def test_a_cancelled_row_changes_no_other(name: str) -> None:
    sampler, asked, g = made(name), requests(9), random.Random(2)
    pool, cancelled = Pool(sampler), set()

    def maybe(rows: dict[int, Request]) -> None:
        if rows and g.random() < 0.15:
            row = g.choice(sorted(rows))
            cancelled.add(int(rows.pop(row).image))
            pool.slots.release(row)

    found = pool.run(asked, maybe)
    rest = [r for r in asked if int(r.image) not in cancelled]
    assert cancelled and rest and same(found, [alone(sampler, r) for r in rest])


def test_a_row_that_is_not_finite_fails_alone() -> None:
    """And leaves nothing to the next request in its slot."""
    sampler, asked = made("scd"), requests(5)
    expected = [alone(sampler, request) for request in asked]
    pool = Pool(sampler)
    for row in range(ROWS):
        pool.admit(row, asked[row])
    pool.slots.session.condition[1] = torch.nan  # type: ignore[attr-defined]
    assert pool.slots.step() == ([], [1])
    pool.slots.release(1)
    pool.admit(1, asked[3])
    rows, found = {0: 0, 1: 3, 2: 2}, {}
    while rows:
        done, failed = pool.slots.step()
        assert not failed
        for row in done:
            found[rows.pop(row)] = pool.slots.read(row)
            pool.slots.release(row)
    assert same([found[i] for i in (0, 2, 3)], [expected[i] for i in (0, 2, 3)])


def test_a_taken_slot_is_refused() -> None:
    pool = Pool(made("ar"))
    pool.admit(0, requests(1)[0])
    with pytest.raises(ValueError, match="Slot 0 is taken"):
        pool.admit(0, requests(1)[0])


@pytest.mark.parametrize(("engine", "again"), [(Slots, False), (PassesOfTheBatch, True)])
def test_no_noise_comes_again_after_65_536_passes(
    engine: type[Slots], again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows count their own passes, so a pool may run for ever; a counter of the pool would run into another key."""
    pool, drawn, uniforms = Pool(made("sjd"), engine), [], Noise.uniforms

    def spied(noise: Noise, *args: Any, **kwargs: Any) -> Any:
        found = uniforms(noise, *args, **kwargs)
        if noise is pool.slots.state.noise:
            taken = [row for row, slot in enumerate(pool.slots.rows) if slot is not None]
            drawn.extend(found[0][taken, 0].tolist())
        return found

    monkeypatch.setattr(Noise, "uniforms", spied)
    image = torch.tensor([0])
    for first in (1, 0):
        state = pool.slots.state
        state.passes = torch.full_like(state.passes, (1 - first) << 16)
        for key in range(first, 120, 2):
            while not pool.slots.free:
                for row in pool.slots.step()[0]:
                    pool.slots.release(row)
            session = fresh(pool.sampler, Request(image, Target(), Guidance(2.0), 5), True)
            noise = Noise(5, image, torch.tensor([key << 16]))
            pool.slots.admit(min(pool.slots.free), session, Target(), Guidance(2.0), noise)
        while len(pool.slots.free) < ROWS:
            for row in pool.slots.step()[0]:
                pool.slots.release(row)
    assert (len(set(drawn)) < len(drawn)) is again
