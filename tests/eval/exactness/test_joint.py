"""The core claim: exact samplers have the joint distribution of sequential sampling, and known-bad ones do not."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engine.test_slots import PassesOfTheBatch, SeedOfThePool
from visar.engine.slots import Slots
from visar.errors import VisarError
from visar.eval.exactness.joint import (
    ALL,
    CASES,
    EXACT_LIMIT,
    MUTANT_LIMIT,
    Case,
    chi_square_z,
    configured,
    distinct,
    exact_samplers,
    measure,
    same_alone,
    values,
    verify,
)
from visar.eval.exactness.joint import expected as joint_of
from visar.eval.exactness.mutants import MUTANTS, LongestOrder
from visar.eval.exactness.tabular import Settings, TabularModel, TabularSession, joint, reference_probs
from visar.samplers import SAMPLERS, SpeculativeJacobi, State, get_sampler, samplers_for
from visar.samplers.verification import StepNoise, Verified

SEQUENCES = 32_768
FEWER = SEQUENCES // 2  # a bias that is at MUTANT_LIMIT with SEQUENCES is at half of it here, beyond EXACT_LIMIT
PLAIN = CASES[0]


def case_of(name: str) -> Case:
    return next(c for c in ALL if c.name == name)


EXACT = distinct()
SLOW = (  # with the rules of others
    "eagle", "eagle-top", "speculative-tree", "spectr", "rsd-s", "ddd", "dyspec", "eagle2", "specdec++", "disco",
    "scd-gumbel",
)  # fmt: skip
SHORT = ("full prefix", "top-p 0.7", "guidance interval", "allowed tokens", "N 5, W 8 > N", "init left",
         "init above, columns 2", "init left-probs", "init mean-probs, columns 3", "V 8, N 5, top-k 3",
         "all at once")  # fmt: skip


# The proof of all samplers has all cases, and is slow itself.
@pytest.mark.parametrize("name", [n for n in EXACT if n not in SLOW])
def test_exact_samplers_have_the_joint_distribution(name: str) -> None:
    cases = tuple(case_of(n) for n in SHORT)
    rows = verify([name], FEWER, seed=0, mutants=False, cases=cases)
    assert len(rows) == sum(hasattr(get_sampler(name), "init") or c.init == "uniform" for c in cases) >= 6
    assert not [r for r in rows if not r.passed]
    if name == "ar":
        assert all(r.tokens_per_pass == 1 for r in rows)
    elif name != "jacobi":
        assert all(r.tokens_per_pass > 1.3 for r in rows)  # exact, and not by decoding token by token


@pytest.mark.parametrize("name", ["specdec++", "disco"])
def test_a_head_that_says_where_a_chain_ends(name: str) -> None:
    """It may be wrong, and go by the drafts themselves. Other samplers do not ask it."""
    (row,) = verify([name], FEWER, seed=0, mutants=False, cases=(case_of("an acceptance head"),))
    assert row.passed and row.tokens_per_pass > 1.3
    assert not verify(["speculative"], FEWER, seed=0, mutants=False, cases=(case_of("an acceptance head"),))


@pytest.mark.parametrize("name", ["ar", "scd", "jacobi"])
def test_an_order_of_its_own(name: str) -> None:
    """Forced tokens go by cells, and images come out in raster order; the full proof has all samplers."""
    cases = ("an order", "an order, init left-probs") if name == "scd" else ("an order",)
    rows = verify([name], FEWER, seed=0, mutants=False, cases=tuple(map(case_of, cases)))
    assert len(rows) == len(cases) and not [r for r in rows if not r.passed]


def test_every_exact_sampler_is_proven_or_has_the_rules_of_one_that_is() -> None:
    exact = {name for name, spec in samplers_for("discrete").items() if spec.exactness != "relaxed"}
    assert exact - set(EXACT) == {"eagle-chain", "hydra", "kangaroo", "medusa", "swift"}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_known_bad_samplers_fail(mutant) -> None:
    case = case_of(mutant.case)
    z, _, _ = measure(configured(mutant.sampler, case), case, SEQUENCES, seed=0)
    assert z > MUTANT_LIMIT


def test_an_order_is_exact_if_it_is_drawn_before_anything_is_tested() -> None:
    """Of the known-bad sampler that keeps the best of several, what it keeps is the mistake."""
    case = case_of("any order")
    one, more = (measure(LongestOrder(orders), case, SEQUENCES // 4, seed=0)[0] for orders in (1, 3))
    assert abs(one) < EXACT_LIMIT and more > MUTANT_LIMIT


@pytest.mark.slow
def test_proof_of_all_samplers() -> None:
    """What `visar verify` runs by default, with a quarter of the sequences."""
    rows = verify(sequences=SEQUENCES)
    assert {r.sampler for r in rows} == {*EXACT, *exact_samplers("diagonal"), *(m.name for m in MUTANTS)}
    assert not [r for r in rows if not r.passed]


def test_every_mutant_has_a_case_and_is_no_registered_sampler() -> None:
    registered = {type(spec.make()) for spec in SAMPLERS.values()}
    for mutant in MUTANTS:
        assert mutant.case in {c.name for c in ALL} and type(mutant.sampler) not in registered


def test_unknown_samplers_are_errors_of_the_user() -> None:
    with pytest.raises(VisarError, match=r"Unknown sampler 'sdj'\. Did you mean 'sjd'\?"):
        verify(["sdj"], 1024)
    with pytest.raises(VisarError, match=r"'gsd' is relaxed: there is nothing to prove\. Exact ones: ar, sjd, scd"):
        verify(["gsd"], 1024)


@dataclass(frozen=True)
class NeighbourNoise(SpeculativeJacobi):
    """Exact in distribution, but a row uses its neighbour's uniforms: its tokens depend on the batch."""

    def verify(self, p: Tensor, q: Tensor, drafts: Tensor, noise: StepNoise, state: State) -> Verified:
        return super().verify(p, q, drafts, noise._replace(accept=noise.accept.roll(1, 0)), state)


@dataclass(frozen=True)
class LockStep(SpeculativeJacobi):
    """Commits only what all rows accept: exact in distribution, but a row's passes depend on the batch."""

    def verify(self, p: Tensor, q: Tensor, drafts: Tensor, noise: StepNoise, state: State) -> Verified:
        verified = super().verify(p, q, drafts, noise, state)
        return Verified(verified.tokens, verified.accepted.min().expand_as(verified.accepted))


@pytest.mark.parametrize("kind", [NeighbourNoise, LockStep])
def test_same_alone_sees_rows_that_lean_on_each_other(kind: type[SpeculativeJacobi]) -> None:
    for sampler, expected in ((SpeculativeJacobi(coupling="maximal"), True), (kind(coupling="maximal"), False)):
        sampler = configured(sampler, PLAIN)
        _, _, tokens = measure(sampler, PLAIN, 512, seed=3)
        assert same_alone(sampler, PLAIN, tokens, seed=3) is expected


@pytest.mark.parametrize("bad", [PassesOfTheBatch, SeedOfThePool])
def test_same_alone_sees_slots_that_are_wrong(bad: type[Slots], monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = configured(get_sampler("scd"), PLAIN)
    _, _, tokens = measure(sampler, PLAIN, 512, seed=3)
    monkeypatch.setattr("visar.eval.exactness.late_rows.Slots", bad)
    assert not same_alone(sampler, PLAIN, tokens, seed=3)


def test_batch_size_does_not_change_a_token() -> None:
    sampler = configured(get_sampler("scd"), PLAIN)
    one, two = (measure(sampler, PLAIN, 1000, seed=1, batch=b)[2] for b in (1000, 96))
    assert torch.equal(one, two)
    assert not torch.equal(one, measure(sampler, PLAIN, 1000, seed=2)[2])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_joint_distribution_is_a_distribution(case: Case) -> None:
    p = joint_of(case)
    assert p.shape == (case.vocab**case.length,) and (p >= 0).all()
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert (p > 0).sum() > 10 and p.max() < 0.5  # not one sequence that anything would find


def row(vocab: int, prefix: tuple[int, ...]) -> int:
    """The table row of a prefix: all shorter ones come first, and those of its length in the order of product()."""
    shorter = sum(vocab**n for n in range(len(prefix)))
    return shorter + list(itertools.product(range(vocab), repeat=len(prefix))).index(prefix)


def test_joint_is_the_product_of_conditionals() -> None:
    model = TabularModel.full_prefix(3, 3, seed=1)
    settings = Settings(scale=1.7, top_p=0.9)
    p = joint(model, settings)
    for sequence in itertools.product(range(3), repeat=3):
        expected = 1.0
        for n, token in enumerate(sequence):
            at = row(3, sequence[:n])
            expected *= reference_probs(model.cond[at].numpy(), model.uncond[at].numpy(), n, settings)[token]
        assert p[values(torch.tensor([sequence]), 3)[0]] == pytest.approx(expected, abs=1e-7)


def test_reference_distribution_by_hand() -> None:
    cond, uncond = np.log([0.1, 0.2, 0.3, 0.4]), np.log([0.25] * 4)
    assert reference_probs(cond, uncond, 0, Settings()) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert reference_probs(cond, uncond, 0, Settings(temperature=0.5)) == pytest.approx(np.array([1, 4, 9, 16]) / 30)
    assert reference_probs(cond, uncond, 0, Settings(top_k=2)) == pytest.approx([0, 0, 3 / 7, 4 / 7])
    assert reference_probs(cond, uncond, 0, Settings(top_p=0.6)) == pytest.approx([0, 0, 3 / 7, 4 / 7])
    assert reference_probs(cond, uncond, 0, Settings(top_p=0.8)) == pytest.approx([0, 2 / 9, 3 / 9, 4 / 9])
    assert reference_probs(cond, uncond, 2, Settings(scale=2.0)) == pytest.approx(np.array([1, 4, 9, 16]) / 30)
    assert reference_probs(cond, uncond, 2, Settings(scale=2.0, interval=1)) == pytest.approx(
        np.array([1, 4, 9, 16]) / 30
    )
    assert reference_probs(cond, uncond, 3, Settings(scale=2.0, interval=1)) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert reference_probs(cond, uncond, 1, Settings(forced=(-1, 2))).tolist() == [0, 0, 1, 0]


def test_the_session_gives_the_row_of_the_prefix_and_forgets_rejected_drafts() -> None:
    model = TabularModel.full_prefix(3, 4, seed=2)
    session = TabularSession(model, 2, window=3)
    session.forward(torch.tensor([[0, 2, 2], [0, 1, 1]]))
    session.commit(torch.tensor([1, 2]))  # row 0: token 1 in place of the draft 2; row 1: tokens 1, 0
    got = session.forward(torch.tensor([[1, 0, 2], [0, 2, 1]]))
    for b, prefix in enumerate(((1, 0, 2), (1, 0, 2, 1))):
        first = int(session.lengths[b])
        for k in range(min(3, 4 - first)):
            assert torch.equal(got[b, k], model.cond[row(3, prefix[: first + k])])


def test_markov_tables_see_two_tokens() -> None:
    model = TabularModel.markov(3, 5, seed=3)
    assert torch.equal(model.cond[row(3, (0, 1, 2))], model.cond[row(3, (2, 1, 2))])
    assert torch.equal(model.cond[row(3, (0, 1, 2))], model.cond[row(3, (1, 0, 1, 2))])
    for other in ((0, 0, 2), (0, 1, 1), (1,), (2,)):
        assert not torch.equal(model.cond[row(3, (0, 1, 2))], model.cond[row(3, other)])


def zs(truth: np.ndarray, tested: np.ndarray, sequences: int, repeats: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array([chi_square_z(rng.multinomial(sequences, truth), tested) for _ in range(repeats)])


@pytest.mark.parametrize("name", ["plain", "top-k 2, V 5", "forced positions", "V 8, N 5, top-k 3"])
def test_chi_square_z_of_the_right_distribution_is_standard_normal(name: str) -> None:
    case = case_of(name)
    p = joint(case.build(), case.settings)
    z = zs(p, p, SEQUENCES, 400)
    assert abs(z.mean()) < 0.2 and 0.85 < z.std() < 1.2
    assert (abs(z) < EXACT_LIMIT).mean() > 0.99


def test_chi_square_z_detects_three_percent() -> None:
    p = joint(PLAIN.build(), PLAIN.settings)
    q = p * np.where(np.random.default_rng(1).permutation(len(p)) % 2, 1.03, 0.97)
    z = zs(q / q.sum(), p, 131_072, 50)
    assert z.mean() > EXACT_LIMIT and z.min() > 2
    assert zs(q / q.sum(), p, 4 * 131_072, 50).min() > MUTANT_LIMIT


def test_chi_square_z_by_hand() -> None:
    p = np.array([0.5, 0.25, 0.25, 0.0])
    assert chi_square_z(np.array([50, 25, 25, 0]), p) == pytest.approx(-1.0)
    assert chi_square_z(np.array([60, 20, 20, 0]), p) == pytest.approx((4 - 2) / 2)
    assert chi_square_z(np.array([50, 25, 24, 1]), p) == float("inf")
    assert chi_square_z(np.array([7, 0]), np.array([1.0, 0.0])) == 0.0
    rare = np.array([0.5, 0.44, 0.03, 0.03])  # the cells of three expected sequences are counted together
    assert chi_square_z(np.array([50, 44, 0, 6]), rare) == pytest.approx(-1.0)
    rare = np.array([0.5, 0.46, 0.03, 0.01])  # four are still too few, so the smallest common cell joins them
    assert chi_square_z(np.array([50, 48, 0, 2]), rare) == pytest.approx(-1 / np.sqrt(2))


def test_a_row_passes_by_its_kind() -> None:
    made = verify(["ar"], 1024, mutants=False, cases=(PLAIN,))[0]
    assert replace(made, z=3.9).passed and not replace(made, z=-4.1).passed
    assert not replace(made, z=0.0, alone=False).passed
    assert not replace(made, kind="mutant", z=9.0).passed and replace(made, kind="mutant", z=11.0).passed
