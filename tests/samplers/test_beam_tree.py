"""Trees that are shaped anew in every round: which drafts they hold, for each row its own."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from visar.engine.drafter import SessionDrafter
from visar.engine.rng import Noise
from visar.engine.tree import MOST_NODES
from visar.errors import VisarError
from visar.eval.exactness.tabular import Settings, TabularModel, TabularSession, joint
from visar.samplers import BeamTree, Target
from visar.samplers.beam_tree import Drafted, siblings

VOCAB, ROWS = 3, 6
MODEL = TabularModel.full_prefix(VOCAB, 6, seed=1)


def drafted(sampler: BeamTree, committed: int = 0, target: Target = Target()) -> tuple[Drafted, torch.Tensor]:
    """The trees that rows with different prefixes get from a drafter that is the model itself, and the prefixes."""
    session = TabularSession(MODEL, ROWS, sampler.window)
    session.drafter = SessionDrafter(TabularSession(MODEL, ROWS, MOST_NODES + 1))
    state = sampler.begin(session, target, Noise(0, torch.arange(ROWS)))
    state.tokens[:, :committed] = torch.randint(VOCAB, (ROWS, committed), generator=torch.Generator().manual_seed(2))
    for n in range(committed):  # rounds that came before, each of one token
        session.drafter.root(state.tokens, torch.full((ROWS,), n))
    session.commit(torch.full((ROWS,), committed))
    return sampler.draft(session.drafter, session, state), state.tokens[:, :committed]


def paths(tree: Drafted, row: int) -> list[tuple[int, ...]]:
    """The tokens on the way to every draft."""
    out: list[tuple[int, ...]] = [()]
    for node, token in enumerate(tree.tokens[row].tolist(), start=1):
        out.append((*out[int(tree.tree.parents[row, node])], token))
    return out[1:]


def likely(prefix: tuple[int, ...], depth: int) -> dict[tuple[int, ...], float]:
    """The probability of every continuation of a prefix, up to `depth` tokens."""
    draft_probs = [joint(replace(MODEL, length=n), Settings()) for n in range(len(prefix) + depth + 1)]

    def of(tokens: tuple[int, ...]) -> float:
        return float(draft_probs[len(tokens)][sum(t * VOCAB**i for i, t in enumerate(reversed(tokens)))])

    tails = (t for n in range(1, depth + 1) for t in itertools.product(range(VOCAB), repeat=n))
    return {tail: of((*prefix, *tail)) / of(prefix) for tail in tails}


@pytest.mark.parametrize("committed", [0, 2])
@pytest.mark.parametrize("nodes", [18, 25])
def test_the_most_likely_drafts_are_tested(committed: int, nodes: int) -> None:
    found, prefixes = drafted(BeamTree(beam=9, depth=3, nodes=nodes, drafter="model"), committed)
    for row in range(ROWS):
        wanted = likely(tuple(prefixes[row].tolist()), 3)
        best = sorted(wanted, key=lambda tail: -wanted[tail])[:nodes]
        assert sorted(paths(found, row)) == sorted(best)
    assert len({tuple(sorted(paths(found, row))) for row in range(ROWS)}) > (1 if committed else 0)


@pytest.mark.parametrize("sampler", [BeamTree(beam=3, depth=4, nodes=11), BeamTree(4, 3, 0, "sampled")])
def test_trees_are_well_formed(sampler: BeamTree) -> None:
    found, _ = drafted(sampler, 2, Target(top_k=2))
    parents, depths = found.tree.parents, found.tree.depths
    assert (parents[:, 1:] < torch.arange(1, parents.shape[1])).all() and (parents[:, 1:] >= 0).all()
    table = siblings(found.tree, VOCAB)
    for row in range(ROWS):
        live = found.tokens[row] >= 0
        tails = [p for p, alive in zip(paths(found, row), live.tolist(), strict=True) if alive]
        assert len(set(tails)) == len(tails) > 5 and depths[row].max() <= sampler.depth
        for node in range(parents.shape[1]):
            below = [c for c in table[row, node].tolist() if c >= 0]
            alive = [c for c in below if found.tokens[row, c - 1] >= 0]
            assert below[: len(alive)] == alive and len(alive) <= 2  # what the distribution could not give comes last
            assert all(parents[row, c] == node for c in below)
            if alive:
                assert found.fed[row, node] >= 0  # the drafter was asked what follows


def test_siblings_are_sampled_from_the_distribution_without_replacement() -> None:
    rows = 40_000
    sampler = BeamTree(beam=2, depth=1, nodes=0, children="sampled")
    session = TabularSession(MODEL, rows, sampler.window)
    session.drafter = SessionDrafter(TabularSession(MODEL, rows, MOST_NODES + 1))
    state = sampler.begin(session, Target(), Noise(3, torch.arange(rows)))
    pairs = sampler.draft(session.drafter, session, state).tokens
    q = joint(replace(MODEL, length=1), Settings())
    for a, b in itertools.permutations(range(VOCAB), 2):
        wanted = q[a] * q[b] / (1 - q[a])
        share = ((pairs[:, 0] == a) & (pairs[:, 1] == b)).double().mean().item()
        assert abs(share - wanted) < 5 * (wanted * (1 - wanted) / rows) ** 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(beam=0), "beam and depth must be 1 or more, not 0 and 5"),
        (dict(depth=0), "beam and depth must be 1 or more, not 10 and 0"),
        (dict(nodes=39), "nodes must be 40 or more for beam 10 and depth 5"),
        (dict(nodes=63), "at most 63 nodes with its root, not 64"),
        (dict(children="sampled"), "nodes must be 0"),
        (dict(children="sampled", nodes=0, beam=20), "at most 63 nodes with its root, not 101"),
        (dict(children="picked"), "The children of a beam are chosen or sampled, not 'picked'"),
    ],
)
def test_bad_input(fields: dict[str, object], message: str) -> None:
    with pytest.raises(VisarError, match=message):
        BeamTree(**fields)  # type: ignore[arg-type]
