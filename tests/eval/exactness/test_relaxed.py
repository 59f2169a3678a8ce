"""Relaxed acceptance: exact where nothing is relaxed, another distribution where something is, and its tables."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from visar.engine.session import Session
from visar.errors import VisarError
from visar.eval.exactness.joint import CASES, Case, configured, measure, run
from visar.samplers import BeamTree, CoolSD, GroupedJacobi, Lantern, LanternPlusPlus, Sampler, get_sampler
from visar.samplers import neighbours as tables
from visar.samplers.neighbours import nearest, neighbours
from visar.samplers.relaxed import Pooled
from visar.samplers.tree_verification import ChildRule, Chosen, Sampled

TREE = "2x2x1"
NAMES = ("plain", "top-p 0.7", "guidance 2.5", "forced positions", "N 7, W 3")


@dataclass(frozen=True)
class NeutralLantern(Lantern):
    """With a budget of 0, which its own check keeps users from asking for."""

    def rule(self, session: Session) -> ChildRule:
        rule = super().rule(session)
        assert isinstance(rule, Pooled)
        return replace(rule, budget=0.0)


PAIRS: dict[str, tuple[Sampler, Sampler]] = {
    "lantern": (NeutralLantern(drafter="model"), BeamTree(drafter="model")),
    "lantern++": (LanternPlusPlus(tree=TREE, lam=1.0, drafter="model"), get_sampler("eagle", tree=TREE)),
    "bild": (CoolSD(omega=1.0, drafter="model"), get_sampler("speculative")),
    "gsd": (GroupedJacobi(group=1), get_sampler("sjd")),
}


@pytest.mark.parametrize("case", [c for c in CASES if c.name in NAMES], ids=lambda c: c.name)
@pytest.mark.parametrize("name", PAIRS)
def test_with_nothing_relaxed_every_token_is_that_of_the_exact_sampler(name: str, case: Case) -> None:
    model, images = case.build(), torch.arange(512)
    relaxed, exact = (run(model, case, configured(s, case), images, seed=4) for s in PAIRS[name])
    assert torch.equal(relaxed.tokens, exact.tokens) and torch.equal(relaxed.commit_pass, exact.commit_pass)


@pytest.mark.parametrize(
    "sampler",
    [
        Lantern(drafter="model", k=1, delta=0.5),
        LanternPlusPlus(tree=TREE, drafter="model", k=2, lam=8.0),
        CoolSD(drafter="model", omega=3.0),
        GroupedJacobi(group=2, gap=0.5),
    ],
    ids=lambda s: s.name,
)
def test_relaxed_samplers_have_another_distribution_and_take_fewer_passes(sampler: Sampler) -> None:
    sampler = configured(sampler, CASES[0])
    z, speed, _ = measure(sampler, CASES[0], 16_384, seed=0)
    _, exact_speed, _ = measure(configured(PAIRS[sampler.name][1], CASES[0]), CASES[0], 16_384, seed=0)
    assert z > 100 and speed > exact_speed
    assert not sampler.exact


def rows(*draft_probs: list[float]) -> Tensor:
    return torch.tensor(draft_probs)


def test_pooling_stops_at_the_first_neighbour_that_is_too_much() -> None:
    table = torch.tensor([[1, 2, 3], [0, 2, 3], [3, 1, 0], [2, 1, 0]])
    r = rows([0.4, 0.1, 0.3, 0.2], [0.4, 0.1, 0.3, 0.2], [0.4, 0.1, 0.3, 0.2])
    y = torch.tensor([0, 2, 3])
    gain, moved = Pooled(table, Chosen(), budget=0.35).pooled(r, y)
    # 0: takes 1 (0.1), not 2 (0.4 in all), and then not 3. 2: takes 3 (0.2) and 1 (0.3). 3: takes 2 (0.3), not 1.
    assert gain.tolist() == pytest.approx([0.1, 0.3, 0.3])
    assert torch.allclose(moved, rows([0.5, 0, 0.3, 0.2], [0.4, 0, 0.6, 0], [0.4, 0.1, 0, 0.5]))
    share, _ = Pooled(table, Sampled(), share=1.0).pooled(r, y)  # as much again as the token's own
    assert share.tolist() == pytest.approx([0.1, 0.3, 0.0])


# Neighbours


@pytest.mark.parametrize("unit", [True, False])
def test_neighbours_are_the_nearest_codes(unit: bool) -> None:
    """By their distance, whatever their length."""
    codes = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 51)[:, None]
    codes = codes / codes.norm(dim=1, keepdim=True) if unit else codes
    for row, found in enumerate(nearest(codes, 7, rows=16)):
        distance = (codes - codes[row]).norm(dim=1)
        distance[row] = torch.inf
        assert found.tolist() == distance.argsort()[:7].tolist()


def test_a_table_is_made_once_and_a_damaged_one_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISAR_CACHE", str(tmp_path / "new"))
    monkeypatch.setattr(tables, "_known", {})
    codes = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
    first = neighbours(codes, 5)
    (file,) = (tmp_path / "new").iterdir()
    calls: list[int] = []
    monkeypatch.setattr(tables, "nearest", lambda c, k: calls.append(k) or nearest(c, k))  # type: ignore[func-returns-value]
    tables._known.clear()
    assert torch.equal(neighbours(codes, 5), first) and not calls
    file.write_bytes(file.read_bytes()[:40])
    tables._known.clear()
    assert torch.equal(neighbours(codes, 5), first) and calls == [5]
    neighbours(codes + 1, 5)
    assert len(list((tmp_path / "new").iterdir())) == 2
    for k in (0, 30):
        with pytest.raises(VisarError, match="k must be from 1 to 29"):
            neighbours(codes, k)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VISAR_CACHE", str(tmp_path / "file" / "cache"))
    assert neighbours(torch.randn(12, 3, generator=torch.Generator().manual_seed(2)), 4).shape == (12, 4)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("lantern", {"delta": 0.0}, "delta must lie between 0 and 1, not 0.0"),
        ("lantern", {"delta": 1.0}, "delta must lie between 0 and 1"),
        ("lantern", {"k": 0}, "k must be 1 or more"),
        ("lantern++", {"lam": 0.9}, "lam must be 1 or more, not 0.9"),
        ("lantern++", {"lam": float("nan")}, "lam must be a finite number"),
        ("cool-sd", {"omega": 0.5}, "omega must be 1 or more"),
        ("cool-sd", {"nu": -1.0}, "nu must be 0 or more"),
        ("gsd", {"group": 0}, "group must be 1 or more"),
        ("gsd", {"gap": 0.0}, "gap must be above 0"),
    ],
)
def test_bad_parameters(name: str, parameters: dict[str, float], message: str) -> None:
    with pytest.raises(VisarError, match=message):
        get_sampler(name, **parameters)


def test_rules_that_have_no_relaxed_form() -> None:
    with pytest.raises(VisarError, match='must be "token"'):
        CoolSD(verification="block")
    with pytest.raises(VisarError, match="has no form for 'gumbel'"):
        GroupedJacobi(coupling="gumbel")
