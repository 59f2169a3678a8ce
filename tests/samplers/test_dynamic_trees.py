"""Trees that grow as far as it pays: where they end, what they count, and that they stay exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.samplers.test_beam_tree import MODEL, ROWS, VOCAB, drafted, likely, paths
from visar.engine.drafter import SessionDrafter
from visar.engine.rng import Noise
from visar.engine.tree import MOST_NODES
from visar.errors import VisarError
from visar.eval.exactness.joint import EXACT_LIMIT, Case, configured, measure, same_alone
from visar.eval.exactness.tabular import Settings, TabularModel, TabularSession
from visar.samplers import CalibratedTree, DynamicDepth, Target, get_sampler
from visar.samplers.beam_tree import best_of

HARD = Case(
    "hard", Settings(temperature=1.4, top_p=0.8, scale=1.8, forced=(-1, 0, -1, -1)), model="full", vocab=4, length=4
)  # fmt: skip


@pytest.mark.parametrize("name", ["ddd", "dyspec"])
def test_the_joint_distribution_of_a_hard_case(name: str) -> None:
    """All cases are those of the full proof, which is slow."""
    sampler = configured(get_sampler(name), HARD)
    z, speed, tokens = measure(sampler, HARD, 4096, seed=0)
    assert abs(z) < EXACT_LIMIT and speed > 1.3 and same_alone(sampler, HARD, tokens, seed=0)


@pytest.mark.parametrize("mass", [0.2, 0.7, 0.85])
def test_a_tree_ends_where_its_beam_is_improbable(mass: float) -> None:
    """Each row's tree, with a drafter that is the model: as deep as the beams above are probable enough."""
    sampler = DynamicDepth(beam=3, depth=4, nodes=12, mass=mass, drafter="model")
    found, prefixes = drafted(sampler, 2)
    reached = []
    for row in range(ROWS):
        wanted, beam, depth = likely(tuple(prefixes[row].tolist()), 4), [((), 1.0)], 0
        while depth < 4 and sum(p for _, p in beam) >= mass:
            depth += 1
            below = [((*path, t), wanted[(*path, t)]) for path, _ in beam for t in range(VOCAB)]
            beam = sorted(below, key=lambda b: -b[1])[:3]
        live = [p for p, token in zip(paths(found, row), found.tokens[row].tolist(), strict=True) if token >= 0]
        assert max(map(len, live)) == depth
        reached.append(depth)
    assert len(set(reached)) > 1 or mass == 0.2


def test_a_row_does_not_depend_on_how_deep_others_go() -> None:
    """Among drafts that there are not, the first have the first numbers, whatever comes after them."""
    sampler = DynamicDepth(beam=4, depth=3, nodes=15)
    value = torch.randn(50, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value[torch.rand(50, 20, generator=torch.Generator().manual_seed(1)) < 0.5] = -torch.inf
    deeper = sampler._tested(torch.cat([value, torch.full((50, 40), -torch.inf)], 1))
    alone = sampler._tested(value)
    assert torch.equal(alone, deeper)
    for row in range(50):
        live = value[row].isfinite().nonzero()[:, 0]
        assert bool(torch.isin(live, alone[row]).all()) or len(live) > 15


def counted(sampler: CalibratedTree, draft: TabularModel, passes: int = 1, batch: int = 64):  # type: ignore[no-untyped-def]
    session = TabularSession(MODEL, batch, sampler.window)
    session.drafter = SessionDrafter(TabularSession(draft, batch, MOST_NODES + 1))
    state = sampler.begin(session, Target(), Noise(3, torch.arange(batch)))
    for _ in range(passes):
        sampler.step(session, state)
    return session, state


def test_what_was_never_tried_is_a_chain() -> None:
    """A first child counts as accepted until it was not, and then there is no use for a second."""
    session, state = counted(CalibratedTree(beam=3, depth=5), MODEL)
    assert bool((session.lengths == 6).all())  # the drafter is the target: all five stand
    assert state.counts[:, 0, :, 0].sum(-1).tolist() == [5.0] * 64 and state.counts[:, :, :, 1:].sum() == 0
    assert torch.equal(state.counts[:, 0], state.counts[:, 1])


def test_children_are_drafted_in_the_order_of_their_worth() -> None:
    sampler = CalibratedTree(beam=3, depth=2, least=0.2)
    session, state = counted(sampler, MODEL, passes=0, batch=2)
    state.counts[:, 0], state.counts[:, 1] = 9.0, torch.tensor([4.0, 9.0, 0.0])  # 1/2, 1, 1/10 of those tested
    state.counts[1, 1] = 0.0  # in the second row none was accepted: 1/10
    found = sampler.draft(session.drafter, session, state)
    assert [len(p) for p, t in zip(paths(found, 0), found.tokens[0].tolist(), strict=True) if t >= 0] == [1, 1, 2, 2, 2]
    assert bool((found.tokens[1] < 0).all())
    deeper = CalibratedTree(beam=3, depth=2, least=0.3)
    found = deeper.draft(session.drafter, session, state)
    assert int((found.tokens[0] >= 0).sum()) == 2  # 1/2 each, and below them 1/4


@pytest.mark.parametrize("off", [-1e-14, 1e-14])
def test_rounding_does_not_choose_between_equal_drafts(off: float) -> None:
    """Of drafts worth 1/4 * 1/5 all reach `least` 1/20, and of more equal ones than the beam holds the first are taken.

    Devices round logarithms in their own ways, and `topk` takes any of the equal ones.
    """
    sampler = CalibratedTree(beam=3, depth=2, least=0.05)
    _, state = counted(sampler, MODEL, passes=0, batch=1)
    state.counts[:, 0], state.counts[:, 1] = 7.0, torch.tensor([1.0, 0.0, 0.0])  # 1/4, and 1/8 of those that come to it
    score = torch.tensor([[0.2, 0.2]], dtype=torch.float64).log() + torch.tensor([[0.0, off]])
    ranks, q = torch.zeros(1, 2, 3, dtype=torch.float64), torch.full((1, 2, VOCAB), 1 / VOCAB)
    found = sampler._values(ranks, q, score, state)
    assert torch.equal(found[0, 0], found[0, 1]) and found[0, :, 0].isfinite().all()
    equal = torch.zeros(2, 9, dtype=torch.float64)
    equal[1, 0] = -1.0
    assert best_of(equal, 4).tolist() == [[0, 1, 2, 3], [1, 2, 3, 4]]


def test_only_what_was_tested_is_counted() -> None:
    sampler = CalibratedTree(beam=3, depth=2, least=0.01)
    session, state = counted(sampler, TabularModel.full_prefix(VOCAB, 6, seed=9), passes=2)
    tested, accepted = state.counts.sum(2).unbind(1)  # by rank
    assert torch.equal(accepted.sum(1).long(), session.lengths - 2)
    assert bool((tested[:, 1:] <= tested[:, :-1] - accepted[:, :-1]).all()) and bool((tested[:, 1] > 0).any())


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("ddd", {"mass": 0.0}, "mass must lie between 0 and 1, not 0.0"),
        ("ddd", {"mass": 1.0}, "mass must lie between 0 and 1"),
        ("ddd", {"nodes": 39}, "nodes must be 40 or more for beam 10 and depth 5"),
        ("dyspec", {"least": 1.5}, "least must lie between 0 and 1, not 1.5"),
        ("dyspec", {"beam": 20}, "at most 63 nodes with its root, not 101"),
    ],
)
def test_bad_parameters(kind: str, fields: dict[str, float], message: str) -> None:
    with pytest.raises(VisarError, match=message):
        get_sampler(kind, **fields)


def test_children_that_they_have_no_form_for() -> None:
    with pytest.raises(VisarError, match=r'ddd is for "chosen" children, .*, not \'sampled\' ones'):
        DynamicDepth(children="sampled", nodes=0)
    with pytest.raises(VisarError, match='dyspec is for "sampled" children'):
        replace(CalibratedTree(), children="chosen", nodes=58)
