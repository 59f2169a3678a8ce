"""Acceptance by a threshold: which drafts pass, and what is left where none may."""

from __future__ import annotations

import math

import pytest
import torch

from visar.errors import VisarError
from visar.eval.exactness.joint import CASES, EXACT_LIMIT, configured, measure, run, values
from visar.eval.exactness.tabular import Settings, joint
from visar.samplers import Blockwise, Typical, get_sampler
from visar.samplers.thresholds import LikelyEnough

PLAIN = CASES[0]
FORCED = next(c for c in CASES if c.name == "forced positions")


def test_likely_enough() -> None:
    p = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]])
    rule = LikelyEnough(0.25, 0.5).at_node(p, p, torch.tensor([4, 4, 4]))
    entropy = -(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.1))
    assert rule.least is not None
    assert rule.least.tolist() == pytest.approx([0.5 * math.exp(-entropy), 0.25, 0.125], rel=1e-6)
    passing = [rule.accepts(p, p, torch.full((3,), y), torch.zeros(3)).tolist() for y in range(4)]
    assert passing == [[True, True, True], [True, False, True], [False, False, True], [False, False, True]]
    assert torch.equal(rule.left(p, p, torch.zeros(3, dtype=torch.long)), p)


def test_typical_acceptance_is_exact_where_only_certain_tokens_pass() -> None:
    sampler = Typical(tree="3x2", drafter="model", epsilon=1.0, delta=1e9)
    z, speed, _ = measure(sampler, PLAIN, 4096, seed=0)
    assert abs(z) < EXACT_LIMIT and speed == 1  # every token is sampled from p


def test_typical_acceptance_has_another_distribution() -> None:
    relaxed, exact = (
        measure(s, PLAIN, 4096, seed=0)
        for s in (Typical(tree="3x2", drafter="model"), get_sampler("eagle-top", tree="3x2"))
    )
    assert relaxed[0] > 100 and relaxed[1] > exact[1] and abs(exact[0]) < EXACT_LIMIT


def test_blockwise_decoding_is_greedy_and_near_codes_make_it_faster() -> None:
    case = next(c for c in CASES if c.name == "V 8, N 5, top-k 3")
    model, images = case.build(), torch.arange(4)
    best = int(joint(model, Settings(top_k=1)).argmax())
    exact, near = (
        run(model, case, configured(Blockwise(drafter="model", near=k), case), images, seed=0) for k in (0, 3)
    )
    assert values(exact.tokens, case.vocab).tolist() == [best] * 4
    assert not torch.equal(near.tokens, exact.tokens) and near.passes < exact.passes < case.length
    assert torch.equal(near.tokens, near.tokens[:1].expand(4, -1))  # it does not sample


@pytest.mark.parametrize("sampler", [Blockwise(drafter="model", near=2), Typical(tree="3x2", drafter="model")])
def test_forced_tokens_stay(sampler: Blockwise | Typical) -> None:
    out = run(FORCED.build(), FORCED, configured(sampler, FORCED), torch.arange(64), seed=0)
    assert out.tokens[:, [2, 4]].tolist() == [[2, 1]] * 64


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("typical", {"epsilon": 0.0}, "epsilon must be above 0 and at most 1, not 0.0"),
        ("typical", {"epsilon": 1.5}, "epsilon must be above 0 and at most 1"),
        ("typical", {"delta": -1.0}, "delta must be above 0"),
        ("blockwise", {"near": -1}, "near must be 0 or more codes, not -1"),
        ("blockwise", {"gamma": 0}, "gamma must be 1 or more"),
    ],
)
def test_bad_parameters(name: str, parameters: dict[str, float], message: str) -> None:
    with pytest.raises(VisarError, match=message):
        get_sampler(name, **parameters)


def test_rules_that_have_no_such_form() -> None:
    with pytest.raises(VisarError, match="typical accepts by a threshold"):
        Typical(children="sampled")
    with pytest.raises(VisarError, match='its verification must be "token"'):
        Blockwise(verification="block")
