"""Chains of drafts that end when a rejection is likely."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from visar.engine.drafter import SessionDrafter
from visar.engine.rng import Noise
from visar.engine.tree import Tree
from visar.errors import VisarError
from visar.eval.exactness.tabular import TabularModel, TabularSession
from visar.samplers import DynamicSpeculative, State, Target
from visar.samplers.dynamic import LEVELS, Rejection, level

MODEL = TabularModel.markov(4, 12, seed=3)


class Counted(TabularSession):
    """Counts the inputs of its passes."""

    inputs = 0

    def forward(self, tokens: Tensor, tree: Tree | None = None, first: int = 0) -> Tensor:
        self.inputs += tokens.shape[1]
        return super().forward(tokens, tree, first)


def begun(sampler: DynamicSpeculative, draft: TabularModel, batch: int = 6) -> tuple[Counted, State]:
    session = Counted(MODEL, batch, sampler.window)
    session.drafter = SessionDrafter(TabularSession(draft, batch, sampler.window + 1))
    return session, sampler.begin(session, Target(), Noise(5, torch.arange(batch)))


def test_what_was_never_tried_is_drafted_to_the_end() -> None:
    session, state = begun(DynamicSpeculative(gamma=5), MODEL)
    DynamicSpeculative(gamma=5).step(session, state)
    assert session.inputs == 6 and bool((session.lengths == 6).all())  # the drafter is the target: all stands
    assert torch.equal(state.counts[:, 0], state.counts[:, 1]) and bool((state.counts[:, 0].sum(-1) == 5).all())


def test_a_drafter_that_fails_is_asked_for_less() -> None:
    sampler = DynamicSpeculative(gamma=5, stop=0.3)
    session, state = begun(sampler, MODEL)
    state.counts[:, 0].fill_(9.0)  # of nine drafts at every level none stood
    sampler.step(session, state)
    assert session.inputs == 2
    state.counts[0].fill_(9.0)  # but in the first row all did: it is asked for a chain, and the others for one draft
    sampler.step(session, state)
    assert session.inputs == 2 + 6


def test_drafts_after_the_end_of_a_chain_are_never_committed() -> None:
    """Rows with chains of 1 and of 5 in one pass: the short ones commit two tokens at most."""
    sampler = DynamicSpeculative(gamma=5, stop=0.3)
    session, state = begun(sampler, MODEL)
    state.counts[1:, 0].fill_(9.0)
    sampler.step(session, state)
    assert session.lengths[0] == 6 and bool((session.lengths[1:] == 2).all())


def test_only_what_was_tested_is_counted() -> None:
    sampler = DynamicSpeculative(gamma=4)
    session, state = begun(sampler, TabularModel.markov(4, 12, seed=8), batch=64)
    sampler.step(session, state)
    tested, accepted = state.counts.sum(-1).unbind(1)
    assert torch.equal(accepted.long(), session.lengths - 1)
    assert torch.equal(tested.long(), session.lengths.clamp_max(4)) and bool((tested > accepted).any())


class Told(SessionDrafter):
    """Its head says 0.8 of token 0, and 0.65 of every other."""

    def chance(self, drafts: Tensor, q: Tensor) -> Tensor:
        return torch.where(drafts == 0, 0.8, 0.65)


@pytest.mark.parametrize("rejection", get_args(Rejection))
def test_a_head_says_where_a_chain_ends(rejection: Rejection) -> None:
    """Of one rejection in the chain the chance passes 0.5 at the second or third draft; of the last draft alone at the
    first that is not token 0. What the image counted does not matter."""
    sampler = DynamicSpeculative(gamma=5, rejection=rejection, stop=0.5 if rejection == "chain" else 0.3)
    session, state = begun(sampler, MODEL, batch=200)
    session.drafter = drafter = Told(TabularSession(MODEL, 200, 7))
    state.counts[:, 0].fill_(9.0)
    u = torch.rand(200, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drafts, q = sampler.draft(drafter, session, state, session.positions(6), u)
    ends = (drafts >= 0).sum(1)
    assert len(ends.unique()) > 1 and bool((q.sum(-1) > 0).eq(drafts >= 0).all())
    for row, end in zip(drafts.tolist(), ends.tolist(), strict=True):
        chances = [0.8 if token == 0 else 0.65 for token in row]
        if rejection == "chain":
            assert math.prod(chances[:end]) < 0.5 <= math.prod(chances[: end - 1])
        else:
            assert all(token == 0 for token in row[: end - 1]) and (end == 5 or row[end - 1] != 0)


def test_entropy_levels() -> None:
    draft_probs = torch.stack([torch.eye(16)[0], torch.full((16,), 1 / 16)])
    assert level(draft_probs).tolist() == [0, 5]  # 2.77 nats, half a nat each
    assert level(torch.full((1, 200_000), 5e-6)).item() == LEVELS - 1  # 12.2 nats and more


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop": 0.0}, "stop must lie between 0 and 1"),
        ({"stop": 1.0}, "stop must lie between 0 and 1"),
        ({"gamma": 0}, "gamma must be 1 or more"),
        ({"verification": "block"}, 'must be "token"'),
        ({"rejection": "token"}, "Unknown rejection 'token'; known: chain, draft"),
    ],
)
def test_bad_input(fields: dict[str, float], message: str) -> None:
    with pytest.raises(VisarError, match=message):
        DynamicSpeculative(**fields)  # type: ignore[arg-type]
