"""Counter-based noise: a function of its coordinates alone, uniform, uncorrelated, and a race that follows the law."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from visar.engine.callable_session import CallableSession
from visar.engine.rng import IMAGES, SPAN, Noise, Purpose
from visar.errors import VisarError
from visar.eval.exactness.joint import chi_square_z
from visar.kernels import noise as noises
from visar.params import SamplingParams
from visar.samplers import Target
from visar.samplers.base import State

COUNT = 40_000


def uniforms(
    seeds: tuple[int, ...] = (0,),
    images: tuple[int, ...] = (0,),
    positions: tuple[int, ...] = (0,),
    passes: tuple[int, ...] = (0,),
    purposes: tuple[Purpose, ...] = (Purpose.STEP,),
) -> Tensor:
    """Uniforms of every combination, flat, the last argument changing fastest but for images and positions."""
    at = torch.tensor([positions]).expand(len(images), -1)
    noises = [Noise(s, torch.tensor(images)) for s in seeds]
    return torch.stack([n.uniforms(w, at, p)[0] for n in noises for p in passes for w in purposes]).flatten()


def ks(x: Tensor, cdf: Callable[[Tensor], Tensor] = lambda x: x) -> float:
    """sqrt(n) times the Kolmogorov-Smirnov distance; above 1.95 once in a thousand."""
    u = cdf(x.double().sort().values)
    steps = torch.arange(len(u) + 1, dtype=torch.float64) / len(u)
    return float(torch.maximum(steps[1:] - u, u - steps[:-1]).max() * math.sqrt(len(u)))


def correlation(x: Tensor, y: Tensor) -> float:
    """sqrt(n) times the correlation: a standard normal variable for independent numbers."""
    return float(torch.corrcoef(torch.stack([x.double(), y.double()]))[0, 1] * math.sqrt(len(x)))


def test_ks_sees_what_is_not_uniform() -> None:
    u = uniforms(positions=tuple(range(COUNT)))
    assert ks(u) < 1.95 < ks(u**1.03)


AXES = {
    "positions": dict(positions=tuple(range(COUNT))),
    "passes": dict(passes=tuple(range(2000))),
    "images": dict(images=tuple(range(COUNT))),
    "last images": dict(images=tuple(range(IMAGES - COUNT, IMAGES))),
    "seeds": dict(seeds=tuple(range(2000))),
    "high words of the seed": dict(seeds=tuple(i << 32 for i in range(2000))),
    "a decoding": dict(
        images=tuple(range(8)), positions=tuple(range(64)), passes=tuple(range(20)), purposes=(*Purpose,)
    ),
}


@pytest.mark.parametrize("axis", AXES)
def test_numbers_are_distinct_uniform_and_uncorrelated_along_each_coordinate(axis: str) -> None:
    u = uniforms(**AXES[axis])
    assert u.dtype == torch.float64 and len(u.unique()) == len(u)
    assert ks(u) < 1.95
    assert ks((u * 2**20) % 1) < 1.95  # the low bits too
    for lag in (1, 2, 7):
        assert abs(correlation(u[:-lag], u[lag:])) < 4


def test_purposes_images_seeds_and_passes_are_uncorrelated_with_each_other() -> None:
    line = tuple(range(COUNT))
    lines = [uniforms(positions=line, purposes=(p,)) for p in Purpose]
    lines += [uniforms(positions=line, images=(1,)), uniforms(positions=line, images=(256,))]
    lines += [uniforms(positions=line, seeds=(1,)), uniforms(positions=line, seeds=(1 << 32,))]
    lines += [uniforms(positions=line, passes=(1,)), uniforms(positions=line, passes=(SPAN - 1,))]
    for i, x in enumerate(lines):
        for y in lines[:i]:
            assert abs(correlation(x, y)) < 4.5
            assert not (x == y).any()


def test_the_two_numbers_of_a_position_are_independent() -> None:
    one, two = Noise(5, torch.arange(4)).uniforms(Purpose.STEP, torch.arange(COUNT // 4).expand(4, -1), 1)
    assert ks(two.flatten()) < 1.95 and abs(correlation(one.flatten(), two.flatten())) < 4


def test_keys_tell_rows_of_one_index_apart() -> None:
    keys = torch.tensor([0, 1, 2**16, 2**32 - 1, 2**32, 2**40, -1, -(2**63)])
    u, _ = Noise(5, torch.zeros(8), keys).uniforms(Purpose.STEP, torch.arange(COUNT // 4).expand(8, -1), 1)
    assert len(u.unique()) == u.numel() and ks(u.flatten()) < 1.95
    assert max(abs(correlation(u[i], u[j])) for i in range(8) for j in range(i)) < 4


def test_batch_order_and_calls_do_not_matter() -> None:
    images, at = torch.tensor([9, 3, 5, 2**20]), torch.tensor([[0, 1, 2], [7, 8, 9], [4, 5, 6], [0, 1, 2]])
    both = (lambda n, at: n.uniforms(Purpose.STEP, at, 3)[1], lambda n, at: n.exponential(Purpose.SHARED, at, 3, 11))
    for make in both:
        noise = Noise(12345, images)
        whole = make(noise, at)
        make(noise, at + 1)  # a call between changes nothing
        assert torch.equal(make(noise, at), whole)
        for b in range(4):
            assert torch.equal(make(Noise(12345, images[b : b + 1]), at[b : b + 1])[0], whole[b])
        order = torch.tensor([2, 0, 3, 1])
        assert torch.equal(make(Noise(12345, images[order]), at[order]), whole[order])
        for k in range(3):  # position 8 gives the same number wherever it stands in the window
            assert torch.equal(make(noise, at[:, k : k + 1])[:, 0], whole[:, k])
        wider = make(noise, torch.cat([at, at[:, -1:] + 1], 1))
        assert torch.equal(wider[:, :3], whole)


def test_rows_have_seeds_of_their_own() -> None:
    seeds, images = [3, 2**64 - 1, 2**63, 3], torch.tensor([0, 0, 5, 1])
    noise, at = Noise(seeds, images), torch.arange(6).expand(4, -1)

    def made(n: Noise, at: torch.Tensor) -> tuple[torch.Tensor, ...]:
        normals = n.normals(Purpose.SHARED, at, 2, 5)
        return (*n.uniforms(Purpose.STEP, at, 3), n.exponential(Purpose.SHARED, at, 3, 11), normals)

    for row, seed in enumerate(seeds):
        alone = made(Noise(seed, images[row : row + 1]), at[:1])
        part = made(noise.of(torch.tensor([row])), at[:1])
        for whole, one, other in zip(made(noise, at), alone, part, strict=True):
            assert torch.equal(whole[row], one[0]) and torch.equal(other, one)


def test_a_pass_counter_on_the_device_counts_like_a_number() -> None:
    noise, at = Noise(7, torch.arange(3)), torch.arange(5).expand(3, -1)
    counter = torch.zeros((), dtype=torch.long)
    for passes in range(3):
        assert torch.equal(noise.uniforms(Purpose.STEP, at, counter)[0], noise.uniforms(Purpose.STEP, at, passes)[0])
        counter += 1


def test_seeds_of_64_bits() -> None:
    seeds = (0, 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1)
    assert len(uniforms(seeds=seeds).unique()) == len(seeds)
    for same in (7.0, np.int8(7), np.uint64(7), torch.tensor(7)):
        assert torch.equal(Noise(same, torch.arange(2)).key, Noise(7, torch.arange(2)).key)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 2**64, 2**64 + 5, 1e30, 2.0**53, 1.5, math.nan, True, np.True_, "1", None])
def test_seeds_that_would_share_their_noise_are_refused(seed: Any) -> None:
    with pytest.raises(VisarError, match=r"The seed must be (from 0 to 18446744073709551615|a whole number), not"):
        Noise(seed, torch.arange(2))
    if seed is not None:  # which is a random one
        with pytest.raises(VisarError, match=r"seed must be (from 0 to 18446744073709551615|a whole number), not"):
            SamplingParams(seed=seed)


@pytest.mark.parametrize("images", [[-1, 0], [0, IMAGES], [0.0, 1.5], [0.0, math.nan]])
def test_image_indices_out_of_range_are_refused(images: list[float]) -> None:
    with pytest.raises(VisarError, match="Image indices are whole numbers from 0 to 16777215"):
        Noise(0, torch.tensor(images))


def test_images_longer_than_there_are_positions_are_refused() -> None:
    for window in (1, 64):
        most = SPAN - 2 * window
        session = CallableSession(lambda tokens: torch.zeros(1), 1, most + 1, 4)
        with pytest.raises(VisarError, match=f"Images may have up to {most} tokens here, not {most + 1}"):
            State.empty(session, Target(), Noise(0, torch.arange(1)), window)


def test_nothing_in_range_shares_a_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Key and counter of every combination of the extremes of all coordinates, and of some in between."""
    seen: list[Tensor] = []

    def spy(key: Tensor, counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        words = torch.broadcast_tensors(*key, *counter)
        assert all(bool(((w >= 0) & (w < 2**32)).all()) for w in words)
        seen.append(torch.stack(words).flatten(1).T)
        return tuple(torch.zeros_like(words[0]) for _ in range(4))

    monkeypatch.setattr(noises, "philox", spy)
    ends = (0, 1, SPAN // 2, SPAN - 1)
    # Lower halves that differ: keys with one lower half and seeds that differ as the upper ones do would share noise,
    # which hashes of 64 bits do not by chance.
    keys = torch.tensor([0, 1, SPAN, 2**32 - 2, 2**32 | 2, 2**48 | 3, -1, -(2**63) | 4, 12345 << 32 | 7])
    images = torch.tensor([0, 1, 255, 256, IMAGES - 1])
    rows = torch.cartesian_prod(images, keys)
    for seed in (0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1):
        noise = Noise(seed, *rows.unbind(1))
        for passes in ends:
            for purpose in Purpose:
                noise.uniforms(purpose, torch.tensor([ends]).expand(len(rows), -1), passes, torch.tensor([0, 9, 77, 5]))
    found = torch.cat(seen)
    assert len(found.unique(dim=0)) == len(found)


@pytest.mark.parametrize("word", [0, 1, SPAN - 1, 2**32 - 2, 2**32 - 1])
def test_extreme_words(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        noises, "philox", lambda key, counter: tuple(torch.full_like(counter[0], word) for _ in range(4))
    )
    noise, at = Noise(0, torch.arange(2)), torch.zeros(2, 3, dtype=torch.long)
    u, e = noise.uniforms(Purpose.STEP, at, 0)[0], noise.exponential(Purpose.SHARED, at, 0, 5)
    assert ((u > 0) & (u < 1)).all() and ((u * 16384).long() < 16384).all()
    assert ((e > 0) & (e < 17)).all() and e.dtype == torch.float32
    assert u[0, 0].item() == pytest.approx(word / 2**32, abs=2**-31)


def test_exponentials_are_exponential_and_their_lanes_independent() -> None:
    e = Noise(3, torch.arange(4)).exponential(Purpose.SHARED, torch.arange(10_000).expand(4, -1), 0, 7)
    assert e.shape == (4, 10_000, 7)
    lanes = e.flatten(0, 1).T
    for i, x in enumerate(lanes):
        assert ks(x, lambda x: 1 - (-x).exp()) < 1.95
        for y in lanes[:i]:
            assert abs(correlation(x, y)) < 4
    assert len(e.unique()) > 0.99 * e.numel()


@pytest.mark.parametrize("p", [(0.5, 0.3, 0.2), (0.05, 0.0, 0.4, 0.15, 0.3, 0.1), tuple(i / 78 for i in range(13))])
def test_the_race_follows_the_law(p: tuple[float, ...]) -> None:
    e = Noise(1, torch.arange(10)).exponential(Purpose.SHARED, torch.arange(20_000).expand(10, -1), 0, len(p))
    winners = (e / torch.tensor(p)).argmin(-1)
    counts = np.bincount(winners.flatten().numpy(), minlength=len(p))
    assert abs(chi_square_z(counts, np.array(p))) < 4
    wrong = np.array(p) * np.where(np.arange(len(p)) % 2, 1.03, 0.97)
    assert chi_square_z(counts, wrong / wrong.sum()) > 4  # the test could have failed
