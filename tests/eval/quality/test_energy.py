"""Energy distances and the tests made of them: what they are by definition, and what seed noise makes of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from visar.errors import VisarError
from visar.eval.quality.metrics.energy import energy, paired_energy_test


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_energy_distance_is_that_of_its_definition() -> None:
    x, y = normal(3, 5), normal(4, 5, seed=1) + 1
    cross = sum(float((a - b).norm()) for a in x for b in y) / 12
    own = [
        sum(float((a - b).norm()) for i, a in enumerate(z) for b in z[:i]) / (n * (n - 1) / 2)
        for z, n in ((x, 3), (y, 4))
    ]
    assert energy(x, y).item() == pytest.approx(2 * cross - sum(own))
    assert energy(x.expand(2, -1, -1), y).tolist() == pytest.approx([energy(x, y).item()] * 2)


def test_energy_distance_has_no_bias_and_sees_a_shift() -> None:
    same, moved = (energy(normal(4000, 3, 2), normal(4000, 3, 2, seed=1) + shift) for shift in (0.0, 0.5))
    error = same.std() / 4000**0.5
    assert abs(same.mean()) < 4 * error < moved.mean()
    assert bool((same < 0).any())


def test_paired_distance_is_that_of_other_pairs() -> None:
    x, y = normal(5, 3), normal(5, 3, seed=1) + 1

    def mean(found: list[Tensor]) -> float:
        return float(torch.stack(found).mean())

    def by_definition(pairs: list[tuple[int, int]]) -> tuple[float, float]:
        apart = mean([(x[i] - y[j]).norm() for i, j in pairs])
        inside = [mean([(z[i] - z[j]).norm() for i, j in pairs]) for z in (x, y)]
        return 2 * apart - sum(inside), 2 * apart

    everyone = [(i, j) for i in range(5) for j in range(5) if i != j]
    for groups in (None, ["a", "b", "a", "b", "a"]):
        pairs = [(i, j) for i, j in everyone if groups is None or groups[i] == groups[j]]
        distance, apart = by_definition(pairs)
        found = paired_energy_test(x, y, groups)
        assert found.distance == pytest.approx(distance, rel=1e-5)
        assert found.share == pytest.approx(distance / apart, rel=1e-5)


PROMPTS = torch.arange(24).repeat_interleave(4)


def pair_of_samples(seed: int, shared: bool) -> tuple[Tensor, Tensor]:
    """Four images per prompt, of one distribution; with `shared` as under one seed: half of the pairs the same."""
    middle = 2 * normal(24, 6, seed=99)[PROMPTS]
    common, own, other = (normal(96, 6, seed=10 * seed + k) for k in range(3))
    if not shared:
        return middle + own, middle + other
    x, y = middle + 0.7 * common + 0.7 * own, middle + 0.7 * common + 0.7 * other
    return x, torch.where((torch.arange(96) % 2 == 0)[:, None], x, y)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_p_is_uniform_under_seed_noise(shared: bool, grouped: bool) -> None:
    groups = PROMPTS.tolist() if grouped else None
    p = torch.tensor(
        [paired_energy_test(*pair_of_samples(seed, shared), groups, 199, seed).p for seed in range(1, 201)]
    )
    for level in (0.05, 0.2, 0.5, 0.8):
        assert abs(float((p <= level).double().mean()) - level) < 4 * (level * (1 - level) / 200) ** 0.5


def test_changes_are_seen() -> None:
    x, y = pair_of_samples(1, shared=True)
    assert paired_energy_test(x, y + 0.2).p < 0.001
    replaced = x.clone()
    replaced[:12] += 4
    assert paired_energy_test(x, replaced).p < 0.005
    x, y = pair_of_samples(1, shared=False)
    swapped = torch.cat([y[4:24], y[:4], y[24:]])  # six prompts mixed up: alike as a whole
    assert paired_energy_test(x, swapped).p > 0.05 and paired_energy_test(x, swapped, PROMPTS.tolist()).p < 0.001


def test_the_same_images_are_no_change() -> None:
    found = paired_energy_test(*(pair_of_samples(1, True)[0],) * 2)
    assert found.p == 1 and found.distance == pytest.approx(0, abs=1e-9) and found.least == pytest.approx(0, abs=1e-9)


def test_samples_that_are_no_pairs() -> None:
    with pytest.raises(VisarError, match=r"one shape and 2 or more rows, not \[3, 2\] and \[4, 2\]"):
        paired_energy_test(normal(3, 2), normal(4, 2))
    with pytest.raises(VisarError, match="No prompt has 2 or more images"):
        paired_energy_test(normal(3, 2), normal(3, 2, seed=1), ["a", "b", "c"])
