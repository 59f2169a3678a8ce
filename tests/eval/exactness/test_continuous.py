"""Samplers of continuous tokens have the joint distribution of plain decoding, and known-bad samplers fail."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from visar.cli import main
from visar.engine.denoising import Denoiser
from visar.engine.loop import decode
from visar.engine.masked_session import MaskedSession
from visar.engine.rng import Noise
from visar.errors import VisarError
from visar.eval.exactness import continuous as continuous_exactness
from visar.eval.exactness.continuous import (
    CASES,
    MUTANT_IMAGES,
    PLAIN,
    Case,
    configured,
    distinct,
    measure,
    run,
    same_alone,
    verify_continuous,
)
from visar.eval.exactness.continuous_mutants import MUTANTS
from visar.eval.exactness.joint import EXACT_LIMIT, MUTANT_LIMIT
from visar.eval.exactness.linear_gaussian import WIDE, Setting, World
from visar.eval.exactness.linear_gaussian import alphas_bar as own_alphas_bar
from visar.eval.exactness.normality import normality_z
from visar.families.mar.denoising import DiffusionDenoiser
from visar.families.mar.diffusion import Schedule, alphas_bar
from visar.families.mar.session import MARSession
from visar.samplers import ContinuousTarget, HeadSpeculation, MaskedAutoregressive, get_sampler, samplers_for

SHORT = ("plain", "temperature 0.7, T 6", "guidance 2.5, linear", "given tokens", "8 orders, 2 conditions",
         "moving variance", "flow head", "L 16 > T", "gamma 8 > N", "one last variance", "all at once")  # fmt: skip


def case_of(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


# The proof


@pytest.mark.parametrize("name", ["mar", "mar-headspec", "cspd-exact"])
def test_exact_samplers_have_the_joint_distribution(name: str) -> None:
    cases = tuple(case_of(n) for n in SHORT)
    rows = verify_continuous([name], 4096, mutants=False, cases=cases)
    assert len(rows) == sum(c.fits(get_sampler(name)) for c in cases) >= 8
    assert not [r for r in rows if not r.passed] and {r.kind for r in rows} == {"exact"}
    if name != "mar":  # rejections are frequent, and drafts are of use
        assert all(r.acceptance is not None and 0.1 < r.acceptance < 0.95 for r in rows)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_known_bad_samplers_fail(mutant: Any) -> None:
    case = case_of(mutant.case)
    assert measure(configured(mutant.sampler, case), case, MUTANT_IMAGES // 4, seed=0).z > MUTANT_LIMIT


def test_no_mutant_is_a_registered_sampler() -> None:
    registered = [configured(get_sampler(name), PLAIN) for name in samplers_for("continuous")]
    assert not [m.name for m in MUTANTS if configured(m.sampler, PLAIN) in registered]


def test_every_exact_sampler_is_proven_and_relaxed_ones_are_measured() -> None:
    assert sorted(distinct()) == [
        "cspd",
        "cspd-exact",
        "mar",
        "mar-disa",
        "mar-gtr",
        "mar-headspec",
    ]  # mar-256 and mar-32-50 are mar
    rows = verify_continuous(["cspd", "mar-disa", "mar-gtr"], 2048, mutants=False)
    assert {r.kind for r in rows} == {"relaxed"} and all(r.passed for r in rows)
    names = ("cspd", "mar-disa", "mar-gtr")
    cspd, disa, gtr = ([r.distance for r in rows if r.sampler == name] for name in names)
    assert min(cspd) > 2 and 0.01 < max(disa) < 0.1 < min(gtr)  # type: ignore[type-var]


@pytest.mark.slow
def test_proof_of_all_samplers() -> None:
    """What `visar verify` runs of continuous tokens by default, with a quarter of the images."""
    rows = verify_continuous(sequences=8192)
    assert {r.sampler for r in rows} == {*distinct(), *(m.name for m in MUTANTS)}
    assert not [r for r in rows if not r.passed]


def test_bad_input() -> None:
    with pytest.raises(VisarError, match=r"Unknown sampler 'mra'\. Did you mean 'mar'\?"):
        verify_continuous(["mra"])
    with pytest.raises(VisarError, match="needs 1024 images or more, not 10"):
        verify_continuous(["mar"], 10)


def test_same_alone_sees_rows_that_lean_on_each_other() -> None:
    sampler = configured(get_sampler("mar-headspec"), PLAIN)
    found = measure(sampler, PLAIN, 64, seed=3)
    assert same_alone(sampler, PLAIN, found, seed=3)
    assert not same_alone(sampler, PLAIN, found, seed=4)
    assert not same_alone(sampler, PLAIN, found._replace(white=found.white.roll(1, 0)), seed=3)
    assert not same_alone(sampler, PLAIN, found._replace(commit_pass=found.commit_pass + 1), seed=3)


def test_verify_of_both_families(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    short = partial(verify_continuous, cases=CASES[:2])
    monkeypatch.setattr(continuous_exactness, "verify_continuous", short)
    options = ["--sequences", "16384", "--no-mutants"]
    assert main(["verify", "--sampler", "mar-disa,jacobi,mar", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-4:-1]] == ["mar-disa", "mar", "mar"] and lines[1].startswith("jacobi")
    assert lines[-4].endswith("relaxed, 0.04 nats") and lines[-3].endswith("exact")
    assert "chi-square" in lines[-1] and "continuous tokens" in lines[-1] and lines[-1].endswith("All rows pass.")
    monkeypatch.setattr("visar.eval.exactness.joint.EXACT_LIMIT", 0.0)
    assert main(["verify", "--sampler", "mar", *options]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("SOME ROWS FAIL.") and "chi-square" not in last


# The model whose distribution is known


def test_the_distribution_is_that_of_a_direct_simulation() -> None:
    """An image of two passes, written out."""
    world = World.random(3, unit=WIDE, seed=2)
    setting = Setting(passes=2, head_steps=6, scale=1.5, temperature=0.9)
    order, rng, n = np.array([2, 0, 1]), np.random.default_rng(1), 200_000
    gain, variance = world.token_distribution(setting)
    x = np.zeros((n, 3, 2))
    for asked, before, scale in (([2], [], 1 + 0.5 / 3), ([0, 1], [2], 1 + 0.5 * 2 / 3)):  # floor(3 cos(pi/4)) = 2
        for i in asked:
            said = [
                world.base[b][i] + sum(x[:, j] @ world.pull[h, i, j].T + world.known[h, i, j] for j in before)
                for h, b in ((0, 1), (1, 2))
            ]
            mean = (said[1] + scale * (said[0] - said[1])) @ world.turn.T + world.shift
            x[:, i] = gain * mean + rng.normal(size=(n, 2)) * variance**0.5
    distribution = world.distribution(setting, order, 1, np.zeros((0, 2)))
    assert abs(normality_z(torch.from_numpy(distribution.whiten(x[:, order].reshape(n, -1))), 2)) < EXACT_LIMIT


def test_the_distribution_of_a_token_is_not_that_of_the_clean_token() -> None:
    """What is tested is the sampler of so many steps; with more, it comes to what the head was made for."""
    world = replace(World.random(2, seed=1), final=np.full(2, 1.0), level=np.full((2, 2), -1.0))  # variance: posterior
    few, many = (world.token_distribution(Setting(1, t)) for t in (6, 500))
    assert np.allclose(many[0], 1, atol=0.01) and np.allclose(many[1], world.variance, rtol=0.02)
    assert abs(few[1] / world.variance - 1).max() > 0.1


def test_the_model_has_its_own_schedule_right() -> None:
    assert np.allclose(own_alphas_bar(), alphas_bar().numpy(), rtol=1e-9)


# What is equal and not merely alike


class ConstantDenoiser(DiffusionDenoiser):
    """A head whose guess does not depend on what it sees."""

    def guess(self, x: Tensor, step: Tensor, condition: Tensor) -> Tensor:
        return torch.cat([condition[:, : self.dim], torch.full_like(x, 0.3)], dim=-1)


class ConstantSession(MARSession):
    def make_denoiser(self, steps: int, temperature: float, latest: int, last_noise: bool) -> Denoiser:
        return ConstantDenoiser(self.mar.diffloss.net, Schedule(steps), self.dim, temperature, last_noise)


def images(session: MaskedSession, sampler: Any, temperature: float = 1.0, seed: int = 0) -> Tensor:
    return decode(session, sampler, ContinuousTarget(temperature), Noise(seed, torch.arange(session.batch))).tokens


def test_a_constant_guess_is_never_rejected_and_gives_the_tokens_of_plain_decoding() -> None:
    world = World.random(6)

    def session() -> MaskedSession:
        slots = world.session(Setting(3), torch.zeros(64, dtype=torch.long), torch.arange(6).expand(64, -1))
        return ConstantSession(slots.mar, torch.zeros(64, dtype=torch.long), slots.order)

    plain, speculative = session(), session()
    # Without noise in the last step every token would be the constant guess, whatever had led there.
    expected = images(plain, MaskedAutoregressive(3, 12, last_noise=True))
    sampler = HeadSpeculation(3, 12, draft=16, adaptive=False, last_noise=True)
    found = images(speculative, sampler)
    assert expected.std(0).min() > 0 and torch.allclose(found, expected, atol=1e-5)
    assert speculative.tested == speculative.accepted == 64 * 6 * 10  # the first step and the last one are not drafts
    assert speculative.denoisers[0].calls < plain.denoisers[0].calls / 4


def test_a_draft_model_that_is_the_target_is_never_rejected() -> None:
    case = case_of("draft = target")
    out = run(case, configured(get_sampler("cspd-exact"), case), torch.arange(512), seed=1)
    assert out.session.accepted == out.session.tested and out.decoded.passes == 2


def test_at_temperature_0_head_speculation_is_plain_decoding() -> None:
    world = World.random(6)

    def tokens(sampler: Any) -> Tensor:
        classes = torch.zeros(16, dtype=torch.long)
        return images(world.session(Setting(3), classes, torch.arange(6).expand(16, -1)), sampler, temperature=0)

    found = tokens(HeadSpeculation(3, 12))
    assert bool(found.isfinite().all()) and torch.equal(found, tokens(MaskedAutoregressive(3, 12)))
