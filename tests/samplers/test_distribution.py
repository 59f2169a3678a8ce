"""The target distribution against a slow reference, its stability, its errors, and guidance by absolute position."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from visar.engine.guidance import Guidance
from visar.errors import VisarError
from visar.samplers.distribution import Target

INF = math.inf
SETTINGS = [(t, k, p) for t in (0.5, 1.0, 2.0) for k in (0, 1, 3, 8, 50) for p in (1.0, 0.9, 0.5, 0.05)]


def slow(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """One distribution in plain Python: rank, cut, exponentiate, cut, divide."""
    kept = set(range(len(logits)))
    if top_k:
        least = sorted(logits, reverse=True)[min(top_k, len(logits)) - 1]
        kept = {v for v in kept if logits[v] >= least}
    most = max(logits)
    weight = {v: math.exp((logits[v] - most) / temperature) for v in kept}
    total = sum(weight.values())
    if top_p < 1:
        before, nucleus = 0.0, set()
        for v in sorted(kept, key=lambda v: (-weight[v], v)):
            if before / total <= top_p:
                nucleus.add(v)
            before += weight[v]
        weight = {v: weight[v] for v in nucleus}
        total = sum(weight.values())
    return [weight.get(v, 0.0) / total for v in range(len(logits))]


def at(batch: int, window: int) -> Tensor:
    return torch.arange(window).expand(batch, -1)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_probs_equal_the_slow_reference(temperature: float, top_k: int, top_p: float) -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, 12, generator=g) * 2
    logits[2:] = logits[2:].round()  # many ties
    p = Target(temperature, top_k, top_p).probs(logits, at(4, 5))
    expected = torch.tensor([[slow(x, temperature, top_k, top_p) for x in row] for row in logits.tolist()])
    assert p.dtype == torch.float32
    assert torch.equal(p == 0, expected == 0)
    torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(p.sum(-1), torch.ones(4, 5))


EXTREMES = [
    *(dict(temperature=t) for t in (1e-5, 1.7e-5, 1e-3, 1e3, 1e30, 1e38)),
    *(dict(top_p=p) for p in (5e-324, 1e-45, 1e-30, 1 - 2**-53, 1 - 1e-9)),
    *(dict(top_k=k) for k in (1, 2**31, 2**63, 10**30)),
    dict(temperature=1e38, top_k=3, top_p=1e-30),
    dict(temperature=1e-5, top_k=3, top_p=0.5),
]
SCALES = (-1e38, -1e4, 0.0, -0.0, 5e-324, 1e-45, 1e-30, 1.0, 1e4, 1e20, 1e38)


@pytest.mark.parametrize("settings", EXTREMES, ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_extreme_settings_give_the_right_limit(scale: float, settings: dict[str, Any]) -> None:
    """Against float64; what float32 cannot hold is an error, and never another distribution."""
    g = torch.Generator().manual_seed(5)
    cond, uncond = (torch.randn(3, 4, 9, generator=g) / 4 for _ in range(2))
    target = Target(**settings).on(torch.device("cpu"), 4, 9)
    p = target.probs(Guidance(scale).combine(cond, uncond, at(3, 4)), at(3, 4))
    logits = uncond.double() + scale * (cond.double() - uncond.double())
    wanted = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings
    expected = torch.tensor([[slow(x, **wanted) for x in row] for row in logits.tolist()])
    if target.broken():
        assert (logits / wanted["temperature"]).abs().max() > torch.finfo(torch.float32).max
    else:
        torch.testing.assert_close(p, expected, rtol=1e-2 if abs(scale) == 1e4 else 1e-4, atol=1e-6)


def test_a_mask_and_a_large_temperature() -> None:
    """-inf over a temperature that float32 does not hold would be NaN."""
    allowed = torch.tensor([True, False, True])
    target = Target(1e38, allowed=allowed).on(torch.device("cpu"), 1, 3)
    assert target.probs(torch.randn(1, 1, 3), at(1, 1)).flatten().tolist() == [0.5, 0.0, 0.5] and not target.broken()


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.5}, {"top_k": 2}])
@pytest.mark.parametrize("bad", [math.nan, INF, None])
def test_what_is_no_distribution_is_noted(settings: dict[str, Any], bad: float | None) -> None:
    for drafted in (False, True):
        logits, target = torch.randn(2, 3, 5), Target(**settings).on(torch.device("cpu"), 3, 5)
        target.probs(logits, at(2, 3), drafted)
        target.check()
        logits[1, 2, slice(None) if bad is None else 4] = -INF if bad is None else bad
        target.probs(logits, at(2, 3) + 1, drafted)  # at a position past the end
        assert not target.broken()
        target.probs(logits, at(2, 3), drafted)
        target.probs(torch.zeros(2, 3, 5), at(2, 3), drafted)  # later passes do not clear it
        with pytest.raises(VisarError, match=f"The {'drafter' if drafted else 'model'} gave no distribution"):
            target.check()


def test_a_forced_token_needs_no_distribution() -> None:
    target = Target(forced=torch.tensor([2, -1])).on(torch.device("cpu"), 2, 4)
    p = target.probs(torch.full((1, 1, 4), math.nan), at(1, 1))
    assert p.flatten().tolist() == [0, 0, 1, 0] and not target.broken()


def probs(logits: list[float], **settings: float) -> list[float]:
    return Target(**settings).probs(torch.tensor([[logits]]), at(1, 1))[0, 0].tolist()


def test_top_k_keeps_ties_with_the_last() -> None:
    x = [math.log(v) for v in (4.0, 2.0, 2.0, 1.0)]
    assert probs(x, top_k=1) == pytest.approx([1, 0, 0, 0])
    assert probs(x, top_k=2) == pytest.approx([0.5, 0.25, 0.25, 0])
    assert probs(x, top_k=3) == pytest.approx([0.5, 0.25, 0.25, 0])
    assert probs(x, top_k=4) == probs(x, top_k=99) == probs(x, top_k=0)


def test_top_p_keeps_the_token_that_crosses() -> None:
    x = [math.log(v) for v in (0.1, 0.5, 0.15, 0.25)]
    assert probs(x, top_p=0.45) == pytest.approx([0, 1, 0, 0])
    assert probs(x, top_p=0.55) == pytest.approx([0, 2 / 3, 0, 1 / 3])
    assert probs(x, top_p=0.8) == pytest.approx([0, 5 / 9, 1.5 / 9, 2.5 / 9])
    assert probs(x, top_p=0.95) == pytest.approx([0.1, 0.5, 0.15, 0.25])
    # Reaching top_p is not passing it.
    assert probs([0.0] * 4, top_p=0.5) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])


def test_top_p_is_measured_after_top_k_and_temperature() -> None:
    x = [math.log(v) for v in (0.4, 0.3, 0.2, 0.1)]
    assert probs(x, top_k=2, top_p=0.55) == pytest.approx([1, 0, 0, 0])  # 4/7 passes 0.55; 0.4 would not
    assert probs(x, temperature=0.5) == pytest.approx([16 / 30, 9 / 30, 4 / 30, 1 / 30])
    assert probs(x, temperature=0.5, top_p=0.5) == pytest.approx([1, 0, 0, 0])


def test_half_precision_logits_give_fp32_distributions() -> None:
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(1)).bfloat16()
    target = Target(0.8, 20, 0.9)
    assert torch.equal(target.probs(logits, at(2, 3)), target.probs(logits.float(), at(2, 3)))


def test_impossible_logits_stay_impossible() -> None:
    assert probs([0.0, -INF, 0.0, -INF], top_k=3, top_p=0.99, temperature=0.7) == pytest.approx([0.5, 0, 0.5, 0])


def test_forced_positions_are_one_hot_by_absolute_position() -> None:
    target = Target(0.7, 2, 0.8, torch.tensor([-1, 3, -1, 0]))
    logits = torch.tensor([5.0, 1.0, 0.0, -INF]).expand(2, 4, 4)
    positions = torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5]])  # the second window runs past the end
    p = target.probs(logits, positions)
    free = Target(0.7, 2, 0.8).probs(logits, positions)
    one_hot = torch.eye(4)
    assert torch.equal(p[0], torch.stack([free[0, 0], one_hot[3], free[0, 2], one_hot[0]]))
    assert torch.equal(p[1], torch.stack([free[1, 0], one_hot[0], one_hot[0], one_hot[0]]))
    assert target.forced_at(positions).tolist() == [[-1, 3, -1, 0], [-1, 0, 0, 0]]
    assert (Target().forced_at(positions) == -1).all()


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.6), (9, 0.7)])
def test_a_distribution_does_not_depend_on_where_its_logits_stand(top_k: int, top_p: float) -> None:
    """Bit for bit, with ties: a draft distribution that differs from itself would reject for nothing."""
    row = (torch.randn(100, generator=torch.Generator().manual_seed(2)) * 2).round()
    other = torch.randn(3, 8, 100, generator=torch.Generator().manual_seed(3))
    target = Target(0.9, top_k, top_p)
    alone = target.probs(row.view(1, 1, -1), at(1, 1))[0, 0]
    for b in range(3):
        for k in range(8):
            logits = other.clone()
            logits[b, k] = row
            assert torch.equal(target.probs(logits, at(3, 8))[b, k], alone)


def test_equal_logits_are_cut_in_the_order_of_the_tokens() -> None:
    p = Target(top_p=0.3).probs(torch.zeros(2, 3, 1000), at(2, 3))
    kept = (p > 0).sum(-1).unique()
    assert len(kept) == 1 and 299 <= int(kept) <= 302
    assert (p[..., : int(kept)] > 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, r"Temperature must be .* above 0 .*, not 0\.0; for greedy decoding use top_k 1\."),
        ({"temperature": 1e-6}, "Temperature must be"),
        ({"temperature": math.inf}, "temperature must be a finite number, not inf"),
        ({"temperature": -1.0}, "Temperature must be"),
        ({"temperature": math.nan}, "temperature must be a finite number, not nan"),
        ({"temperature": 1e39}, r"Temperature must be a number above 0 \(1e-05 at least, 1e\+38 at most\), not 1e\+39"),
        ({"temperature": True}, "temperature must be a number, not True"),
        ({"top_k": True}, "top_k must be a whole number, not True"),
        ({"top_k": 2.5}, "top_k must be a whole number, not 2.5"),
        ({"top_p": True}, "top_p must be a number, not True"),
        ({"top_k": -1}, r"top_k must be 0 \(all tokens\) or above, not -1\."),
        ({"top_p": 0.0}, r"top_p must be above 0 and at most 1, not 0.0\."),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1"),
        ({"top_p": math.nan}, "top_p must be a finite number, not nan"),
    ],
)
def test_bad_settings_are_errors_of_the_user(settings: dict[str, float], message: str) -> None:
    with pytest.raises(VisarError, match=message):
        Target(**settings)


@pytest.mark.parametrize("scale", [1e39, -1e39, math.nan, INF])
def test_bad_guidance_is_an_error_of_the_user(scale: float) -> None:
    with pytest.raises(VisarError, match=r"The guidance scale must be from -1e\+38 to 1e\+38, not"):
        Guidance(scale)


@pytest.mark.parametrize(
    "forced",
    [[-1, 2, -1], [-1, 2, -1, -1, -1], [-1, -1, -1, 5], [-1, -7, 0, 0], [[-1] * 4], [0.5, 1, 2, 3], [True] * 4, []],
)
def test_forced_tokens_that_do_not_fit_are_errors_of_the_user(forced: list[Any]) -> None:
    with pytest.raises(VisarError, match=r"forced must hold 4 entries, each -1 or a token below 5|list of token ids"):
        Target(forced=torch.tensor(forced)).on(torch.device("cpu"), 4, 5)
    assert Target().on(torch.device("cpu"), 4, 5) == Target()


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("interval", [-1, 0, 2, 100])
def test_guidance_by_absolute_position(scale: float, interval: int) -> None:
    g = torch.Generator().manual_seed(4)
    cond, uncond = (torch.randn(2, 4, 6, generator=g) for _ in range(2))
    positions = torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5]])
    got = Guidance(scale, interval).combine(cond, uncond, positions)
    for b in range(2):
        for k in range(4):
            # Tokens 0..interval + 1 are guided: the reference counts steps, and token 0 comes before step 0.
            guided = interval < 0 or int(positions[b, k]) in range(interval + 2)
            expected = (1 - scale) * uncond[b, k] + scale * cond[b, k] if guided else cond[b, k]
            torch.testing.assert_close(got[b, k], expected)


def test_guidance_of_scale_one_needs_no_second_half() -> None:
    assert not Guidance().active and not Guidance(1.0, 5).active
    assert Guidance(0.0).active and Guidance(1.01).active
