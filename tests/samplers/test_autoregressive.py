"""Plain decoding with forced tokens, on models of tables: fewer passes, and every token as before."""

from __future__ import annotations

import pytest
import torch

from visar.engine.guidance import Guidance
from visar.engine.loop import decode
from visar.engine.rng import Noise
from visar.eval.exactness.late_rows import decoded_late
from visar.eval.exactness.tabular import TabularModel, TabularSession
from visar.samplers import Target, get_sampler


@pytest.mark.parametrize(
    ("forced", "passes"),
    [
        ([-1, -1, -1, -1, -1, -1], 6),
        ([-1, -1, 2, -1, -1, 1], 4),  # the ends of two rows
        ([2, -1, -1, -1, -1, -1], 5),
        ([-1, -1, -1, -1, -1, 0], 5),
        ([-1, 1, 2, 0, -1, 1], 3),  # of a run every other one is fed along
        ([0, 1, 2, 0, 1, 2], 3),
    ],
)
def test_forced_tokens_cost_fewer_passes_and_change_no_other(forced: list[int], passes: int) -> None:
    model, images = TabularModel.full_prefix(3, 6, seed=1), torch.arange(64)
    target, sampler = Target(0.9, forced=torch.tensor(forced)), get_sampler("ar")

    def session(batch: int, window: int) -> TabularSession:
        return TabularSession(model, batch, window, Guidance(2.0))

    plain = decode(session(64, 1), sampler, target, Noise(5, images))
    assert plain.passes == 6
    found = decode(session(64, 2), sampler, target, Noise(5, images))
    assert torch.equal(found.tokens, plain.tokens) and found.passes == passes
    assert int(found.commit_pass.max()) + 1 == passes
    late = decoded_late(lambda batch, _: session(batch, 2), sampler, target, Guidance(), images[:8], 5)
    assert torch.equal(late, plain.tokens[:8])
