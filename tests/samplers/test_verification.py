"""The acceptance rules on cases small enough to know the answer, and their distributions by counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from visar.eval.exactness.joint import chi_square_z
from visar.samplers.verification import (
    StepNoise,
    accepts,
    gumbel_max,
    leading,
    residual,
    sample,
    verify_greedy,
    verify_gumbel,
    verify_independent,
    verify_maximal,
)

RULES = {"independent": verify_independent, "maximal": verify_maximal, "gumbel": verify_gumbel}
HIGHEST, LOWEST = 1 - 2.0**-53, 2.0**-53  # the extreme uniforms that the noise can give
MANY = 40_000
P, Q = torch.tensor([0.1, 0.4, 0.0, 0.2, 0.3]), torch.tensor([0.5, 0.1, 0.1, 0.1, 0.2])
TV = 0.5

every_rule = pytest.mark.parametrize("rule", RULES)


def draft_probs(batch: int, columns: int, vocab: int, seed: int) -> Tensor:
    """Random distributions, about a third of whose entries are zero."""
    g = torch.Generator().manual_seed(seed)
    w = torch.rand(batch, columns, vocab, generator=g) * (torch.rand(batch, columns, vocab, generator=g) > 0.35)
    w[..., 0] += 1e-3
    return w.roll(seed, -1) / w.sum(-1, keepdim=True)


def noise(batch: int, window: int, vocab: int, seed: int = 0, accept: float | None = None) -> StepNoise:
    g = torch.Generator().manual_seed(seed)
    u, v = torch.rand(2, batch, window, generator=g, dtype=torch.float64).clamp(LOWEST, HIGHEST)
    e = torch.empty(batch, window, vocab).exponential_(generator=g)
    return StepNoise(u if accept is None else torch.full_like(u, accept), v, e)


def spread(probs: Tensor, columns: int, batch: int = MANY) -> Tensor:
    return probs.expand(batch, columns, -1)


def drafted(rule: str, q: Tensor, c: StepNoise, seed: int = 1) -> Tensor:
    """Drafts from q, made as this coupling makes them."""
    if rule == "gumbel":
        return gumbel_max(q, c.exponential[:, :-1])
    u = torch.rand(q.shape[:-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return sample(q, u)


def z_of(tokens: Tensor, probs: Tensor) -> float:
    return chi_square_z(
        np.bincount(tokens.numpy(), minlength=len(probs)), probs.double().numpy() / float(probs.double().sum())
    )


@every_rule
@pytest.mark.parametrize("accept", [LOWEST, 0.5, HIGHEST])
def test_equal_distributions_keep_everything(rule: str, accept: float) -> None:
    p = draft_probs(50, 5, 9, seed=1)
    c = noise(50, 5, 9, accept=accept)
    drafts = drafted(rule, p[:, :-1], c)
    tokens, accepted = RULES[rule](p, p[:, :-1].clone(), drafts, c)
    assert (accepted == 4).all() and torch.equal(tokens[:, :-1], drafts)
    assert (p[:, -1].gather(-1, tokens[:, -1:]) > 0).all()


@every_rule
def test_impossible_drafts_are_rejected_by_every_uniform(rule: str) -> None:
    p, q = spread(P, 3, 200), spread(F.one_hot(torch.tensor(2), 5).float(), 2, 200)
    tokens, accepted = RULES[rule](p, q, torch.full((200, 2), 2), noise(200, 3, 5, accept=LOWEST))
    assert (accepted == 0).all() and (tokens != 2).all()


@every_rule
def test_disjoint_supports(rule: str) -> None:
    p, q = spread(torch.tensor([0.0, 0.0, 0.3, 0.7]), 3), spread(torch.tensor([0.6, 0.4, 0.0, 0.0]), 2)
    c = noise(MANY, 3, 4)
    tokens, accepted = RULES[rule](p, q, drafted(rule, q, c), c)
    assert (accepted == 0).all() and (tokens >= 2).all()
    assert abs(z_of(tokens[:, 0], p[0, 0])) < 4  # the whole of p is residual


@every_rule
@pytest.mark.parametrize("bad", range(5))
def test_the_first_rejection_counts(rule: str, bad: int) -> None:
    """Column `bad` is impossible, and so is every second one behind it; 4 stands for none."""
    drafts = torch.tensor([[1, 2, 0, 3]])
    wanted = drafts.clone()
    wanted[:, bad::2] = (wanted[:, bad::2] + 1) % 4
    p = F.one_hot(torch.cat([wanted, torch.tensor([[2]])], 1), 4).float()
    tokens, accepted = RULES[rule](p, F.one_hot(drafts, 4).float(), drafts, noise(1, 5, 4))
    assert accepted.tolist() == [bad]
    assert tokens.tolist() == [[*wanted[0].tolist(), 2]]


def test_rows_are_judged_apart() -> None:
    drafts = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 0]])
    q = F.one_hot(drafts, 2).float()
    p = F.one_hot(torch.tensor([[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1]]), 2).float()
    for rule in RULES.values():
        tokens, accepted = rule(p, q, drafts, noise(3, 4, 2))
        assert accepted.tolist() == [0, 1, 3] and torch.equal(tokens, p.argmax(-1))


def test_acceptance_is_the_ratio_of_the_distributions() -> None:
    p, q = torch.tensor([[[0.1, 0.9]]]), torch.tensor([[[0.4, 0.6]]])
    d = torch.tensor([[0]])
    assert accepts(p, q, d, torch.tensor([[0.2499]], dtype=torch.float64)).item()
    assert not accepts(p, q, d, torch.tensor([[0.2501]], dtype=torch.float64)).item()
    assert accepts(p, q, 1 - d, torch.tensor([[HIGHEST]], dtype=torch.float64)).item()  # p(d) > q(d)
    assert leading(torch.tensor([[True, True, False, True], [False] * 4, [True] * 4])).tolist() == [2, 0, 4]


def broken_in_front(rule: str, c: StepNoise) -> tuple[Tensor, Tensor]:
    """Tokens and drafts of a window whose first draft is impossible, from Q to P in the columns behind it."""
    q, p = spread(Q, 3).clone(), spread(P, 4).clone()
    q[:, 0] = F.one_hot(torch.tensor(2), 5).float()
    drafts = drafted(rule, q, c)
    tokens, accepted = RULES[rule](p, q, drafts, c)
    assert (accepted == 0).all()
    return tokens, drafts


def test_after_a_rejection_independent_samples_again() -> None:
    c = noise(MANY, 4, 5)
    tokens, drafts = broken_in_front("independent", c)
    assert torch.equal(tokens[:, 1:], sample(spread(P, 3), c.sample[:, 1:]))
    same = (tokens[:, 1] == drafts[:, 1]).double().mean().item()
    assert same == pytest.approx(float(P @ Q), abs=4 * math.sqrt(0.25 / MANY))


def test_after_a_rejection_maximal_keeps_as_often_as_can_be() -> None:
    c = noise(MANY, 4, 5)
    tokens, drafts = broken_in_front("maximal", c)
    kept = accepts(spread(P, 2), spread(Q, 2), drafts[:, 1:], c.accept[:, 1:3])
    assert torch.equal(tokens[:, 1:3] == drafts[:, 1:], kept)
    assert kept.double().mean().item() == pytest.approx(1 - TV, abs=4 * math.sqrt(0.25 / 2 / MANY))


def test_after_a_rejection_gumbel_runs_the_shared_exponential_noise() -> None:
    c = noise(MANY, 4, 5)
    tokens, drafts = broken_in_front("gumbel", c)
    assert torch.equal(tokens[:, 1:], gumbel_max(spread(P, 3), c.exponential[:, 1:]))
    same = (tokens[:, 1] == drafts[:, 1]).double().mean().item()
    assert (1 - TV) / (1 + TV) < same < 1 - TV


@every_rule
def test_tokens_after_a_rejection_have_the_distribution_p(rule: str) -> None:
    tokens, _ = broken_in_front(rule, noise(MANY, 4, 5))
    for column in range(4):
        assert abs(z_of(tokens[:, column], P)) < 4


@every_rule
def test_acceptance_rate_residual_and_output_distribution(rule: str) -> None:
    c = noise(MANY, 2, 5, seed=2)
    p, q = spread(P, 2), spread(Q, 1)
    drafts = drafted(rule, q, c)
    tokens, accepted = RULES[rule](p, q, drafts, c)
    assert accepted.double().mean().item() == pytest.approx(1 - TV, abs=4 * math.sqrt(0.25 / MANY))
    assert abs(z_of(tokens[accepted == 0, 0], (P - Q).clamp_min(0))) < 4
    assert abs(z_of(tokens[accepted == 1, 0], torch.minimum(P, Q))) < 4
    assert abs(z_of(tokens[:, 0], P)) < 4
    assert abs(z_of(tokens[accepted == 1, 1], P)) < 4  # the bonus token, whose distribution asks nothing of the first
    assert z_of(tokens[:, 0], 0.97 * P + 0.03 * Q) > 4  # the count could have failed


@every_rule
def test_impossible_tokens_never_come_out(rule: str) -> None:
    for seed in range(4):
        p, q = draft_probs(3000, 5, 7, seed), draft_probs(3000, 4, 7, seed + 10)
        assert (p == 0).double().mean() > 0.2
        c = noise(3000, 5, 7, seed)
        drafts = drafted(rule, q, c)
        assert (q.gather(-1, drafts[..., None]) > 0).all()
        for extreme in (None, LOWEST, HIGHEST):
            used = c if extreme is None else StepNoise(*(torch.full_like(u, extreme) for u in c[:2]), c.exponential)
            tokens, _ = RULES[rule](p, q, drafts, used)
            assert (p.gather(-1, tokens[..., None]) > 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_gumbel_coupling_probability(seed: int) -> None:
    """Two races with shared noise agree with probability sum_v 1 / sum_w max(p_w / p_v, q_w / q_v)."""
    p, q = draft_probs(2, 1, 6, seed + 1)[:, 0]
    e = torch.empty(MANY, 6).exponential_(generator=torch.Generator().manual_seed(seed))
    same = (gumbel_max(p, e) == gumbel_max(q, e)).double().mean().item()
    exact = sum(1 / torch.maximum(p / p[v], q / q[v]).sum().item() for v in range(6) if p[v] > 0 and q[v] > 0)
    error = 4 * math.sqrt(0.25 / MANY)
    assert same == pytest.approx(exact, abs=error)
    tv = (p - q).clamp_min(0).sum().item()
    assert (1 - tv) / (1 + tv) - error < same < 1 - tv + error
    assert abs(z_of(gumbel_max(p, e), p)) < 4


def test_residual() -> None:
    torch.testing.assert_close(residual(P, Q), torch.tensor([0.0, 0.3, 0.0, 0.1, 0.1]))
    assert torch.equal(residual(P, P), P)  # equal distributions have none: it is never needed, and must not be 0/0
    assert torch.equal(residual(P, P - 1e-9), P)


@pytest.mark.parametrize("u", [LOWEST, 1e-12, 0.3, 0.5, 0.7, 1 - 1e-12, HIGHEST])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 3.7])
def test_sample_takes_no_token_of_weight_zero(u: float, scale: float) -> None:
    weights = torch.tensor([0.0, 0.0, 0.2, 0.0, 0.3, 0.5, 0.0, 0.0]) * scale
    expected = 2 if u < 0.2 else 4 if u < 0.5 else 5
    if u != 0.5:  # there 0.2 + 0.3 in fp32 decides
        assert sample(weights, torch.tensor(u, dtype=torch.float64)).item() == expected
    assert weights[sample(weights, torch.tensor(u, dtype=torch.float64))] > 0


def test_sample_follows_the_distribution() -> None:
    u = (torch.arange(MANY, dtype=torch.float64) + 0.5) / MANY  # stratified, so the counts are nearly exact
    counts = torch.bincount(sample(P.expand(MANY, -1) * 0.37, u), minlength=5)
    assert ((counts - P * MANY).abs() <= 1).all()


def test_sample_keeps_the_tail_of_a_large_vocabulary() -> None:
    """One token of weight 1 and 184,621 of 1e-9: sums in fp32 would lose every one of them."""
    vocab, small = 184_622, 1e-9
    weights = torch.full((vocab,), small)
    weights[0] = 1.0
    tail = float(weights[1].double()) * (vocab - 1)
    u = (1 + torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64) * tail) / (1 + tail)
    at = sample(weights.expand(3, -1), u).double() / vocab
    torch.testing.assert_close(at, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), rtol=0, atol=1e-4)
    ends = sample(weights.expand(2, -1), torch.tensor([LOWEST, HIGHEST], dtype=torch.float64))
    assert ends.tolist() == [0, vocab - 1]


@pytest.mark.parametrize("vocab", [3, 16_384, 184_622])
def test_sample_at_the_ends_of_real_distributions(vocab: int) -> None:
    """Leading and trailing zeros at full size, with sums that are not round."""
    weights = torch.rand(8, vocab, generator=torch.Generator().manual_seed(0)).pow(8)
    weights[:, 0] = weights[:, -1] = 0
    weights[:, 1:-1] += 1e-30
    for u, expected in ((LOWEST, 1), (HIGHEST, vocab - 2)):
        at = sample(weights, torch.full((8,), u, dtype=torch.float64))
        assert (weights.gather(-1, at[:, None]) > 0).all()
        if vocab == 3:
            assert (at == expected).all()


def test_greedy_keeps_what_equals_the_argmax() -> None:
    p = torch.tensor([[[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]]]).expand(3, -1, -1)
    drafts = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 1]])
    tokens, accepted = verify_greedy(p, drafts)
    assert accepted.tolist() == [3, 1, 0] and tokens.tolist() == [[1, 0, 1, 0]] * 3
