"""Variants of Jacobi windows: what quantile coupling samples, what forced commits bound, and orders of codes."""

from __future__ import annotations

import math
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import Tensor

from visar.engine.rng import Purpose
from visar.eval.benchmark.jacobi_variants import (
    ForcedCommits,
    QuantileCoupling,
    by_component,
    by_neighbour,
    main,
    surprise,
)
from visar.eval.benchmark.lookups import target_probs
from visar.generation.model import ImageModel
from visar.generation.rows import noise_of
from visar.params import SamplingParams
from visar.samplers import SpeculativeJacobi

WINDOW, LABEL = 6, 3


@pytest.fixture
def model(class_folder: Path) -> ImageModel:
    found = ImageModel.load(class_folder)
    found.bar = {"disable": True}
    return found


@pytest.mark.parametrize("codes", [(), tuple(torch.randperm(24, generator=torch.Generator().manual_seed(5)).tolist())])
def test_quantile_coupling_gives_the_tokens_of_sequential_sampling(model: ImageModel, codes: tuple[int, ...]) -> None:
    params, length = model.params_of(SamplingParams(seed=7, top_k=5)), model.family.layout.length
    noise = noise_of([LABEL], 2, 7, model.device)
    u = noise.uniforms(Purpose.SHARED, torch.arange(length)[None], 0)[0][0].tolist()
    tokens = torch.zeros(length, dtype=torch.long)
    for n in range(length):
        p = target_probs(model, LABEL, tokens, params)[n].double()
        line = codes or tuple(range(len(p)))
        below = accumulate(p[list(line)].tolist())
        tokens[n] = next(code for code, mass in zip(line, below, strict=True) if mass > u[n])
    found = model.generate(LABEL, params, sampler=QuantileCoupling(window=WINDOW, codes=codes), first_image=2)
    assert found.tokens[0].tolist() == tokens.tolist()
    assert found.stats.passes_per_image[0] < length  # some drafts were accepted


def test_forced_commits_bound_the_passes_that_a_token_waits(model: ImageModel) -> None:
    def decode(sampler: SpeculativeJacobi) -> tuple[Tensor, Tensor]:
        output = model.generate([0, 1, 2], sampler=sampler, seed=1, top_k=2, guidance_scale=9.0, output_type="tokens")
        return output.tokens, output.commit_pass

    scd = decode(SpeculativeJacobi(window=WINDOW, coupling="maximal"))
    # Every pass commits the first position of its window, so none waits longer anyway.
    never = decode(ForcedCommits(window=WINDOW, refinements=WINDOW - 1))
    assert torch.equal(never[0], scd[0]) and torch.equal(never[1], scd[1])
    length, passes = scd[0].shape[1], []
    for refinements in (0, 1, 2):
        _, at = decode(ForcedCommits(window=WINDOW, refinements=refinements))
        entered = torch.cat([torch.zeros(len(at), WINDOW, dtype=torch.long), at[:, :-WINDOW] + 1], dim=1)
        assert (at - entered).max() == refinements
        passes.append((at.amax(1) + 1).tolist())
    assert passes[0] == [math.ceil(length / WINDOW)] * 3
    passes.append((scd[1].amax(1) + 1).tolist())
    assert all(a < b < c <= d for a, b, c, d in zip(*passes, strict=True))


def test_orders_of_codes() -> None:
    angles = torch.tensor([0.0, 40.0, 10.0, 25.0]).deg2rad()
    codebook = torch.stack([angles.cos(), angles.sin()], 1)
    assert by_neighbour(codebook) == [0, 2, 3, 1]
    assert by_component(codebook) == [0, 2, 3, 1] and by_component(codebook.flip(1)) == [0, 2, 3, 1]


def test_a_token_that_top_k_leaves_out_has_a_finite_surprise(model: ImageModel) -> None:
    params = model.params_of(SamplingParams(seed=0, top_k=1))
    tokens = torch.arange(model.family.layout.length) % 24
    p = target_probs(model, LABEL, tokens, model.params_of(SamplingParams(top_k=0)))
    by_hand = sum(-math.log(p[n, token]) for n, token in enumerate(tokens.tolist())) / len(tokens)
    assert surprise(model, LABEL, tokens, params) == pytest.approx(by_hand, rel=1e-5)


def test_it_runs_and_refuses(class_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for seed in ("3", "3", "4"):
        assert main(["--model", str(class_folder), "--images", "2", "--window", "5", "--seed", seed]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]
    first, second = printed[0].split("COUPLING")
    assert [row[0] for row in map(str.split, first.splitlines())] == ["REFINEMENTS", "ar", "scd", *["at"] * 5]
    assert "ar           25.0 ± 0.0" in first and len(second.splitlines()) == 6
    assert main(["--images", "1"]) == 2 and "--images must be 2 or more, not 1" in capsys.readouterr().err
    assert main(["--window", "1"]) == 2 and "window must be 2 or more" in capsys.readouterr().err
    assert main(["--model", "icons-mar"]) == 2 and "models of discrete tokens" in capsys.readouterr().err
