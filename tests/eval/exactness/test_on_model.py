"""Samplers verified on loaded models by Rosenblatt's test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from visar.errors import VisarError
from visar.eval.exactness.joint import EXACT_LIMIT
from visar.eval.exactness.mutants import NoResidual
from visar.eval.exactness.on_model import BATCH, CELLS, rosenblatt, verify_model
from visar.eval.exactness.ranks import rank_z
from visar.samplers import SpeculativeJacobi, State
from visar.samplers.verification import StepNoise, Verified


def test_exact_samplers_pass_on_a_model(class_pipe: Any) -> None:
    model = class_pipe.image_model
    torch.nn.init.normal_(model.family.model.output.weight)
    seen: list[Any] = []
    rows = verify_model(model, 3, ["ar", "sjd"], tokens=25 * 400, report=seen.append)
    assert rows == seen and [row.sampler for row in rows] == ["ar", "sjd"]
    assert all(row.passed and abs(row.z) < EXACT_LIMIT and row.alone and row.sequences == 400 for row in rows)
    u = rosenblatt(model, 3, model.generate([3] * 64, output_type="tokens").tokens, torch.Generator().manual_seed(0))
    assert u.shape == (64, 25) and float(u.min()) >= 0 and float(u.max()) < 1 and abs(float(u.mean()) - 0.5) < 0.05


@dataclass(frozen=True)
class OneMore(SpeculativeJacobi):
    """Accepts one draft more than it may."""

    def verify(self, p: Tensor, q: Tensor, drafts: Tensor, noise: StepNoise, state: State) -> Verified:
        tokens, accepted = super().verify(p, q, drafts, noise, state)
        return Verified(tokens, (accepted + 1).clamp_max(drafts.shape[1]))


@pytest.mark.parametrize(("mutant", "std"), [(NoResidual(window=4), 0.1), (OneMore(window=4), 0.25)])
def test_known_bad_samplers_are_caught(class_pipe: Any, mutant: Any, std: float) -> None:
    model = class_pipe.image_model
    torch.manual_seed(1)
    torch.nn.init.normal_(model.family.model.output.weight, std=std)
    tokens = model.generate([3] * 600, sampler=mutant, output_type="tokens").tokens
    assert rank_z((rosenblatt(model, 3, tokens, torch.Generator()) * CELLS).long(), CELLS) > EXACT_LIMIT


def test_tokens_that_are_certain_pass(class_pipe: Any) -> None:
    """Their uniforms are the test's own noise, which is not that of another part of the images again."""
    torch.manual_seed(0)
    torch.nn.init.normal_(class_pipe.image_model.family.model.output.weight, std=100.0)
    (row,) = verify_model(class_pipe.image_model, 3, ["ar"], tokens=25 * 4 * BATCH)
    assert row.passed


def test_what_proves_nothing_is_refused(class_pipe: Any) -> None:
    for name, message in (("zipar", "'zipar' is relaxed"), ("eagle2", "needs a drafter of the kind 'eagle'")):
        with pytest.raises(VisarError, match=message):
            verify_model(class_pipe.image_model, 3, [name])
