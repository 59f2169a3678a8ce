"""Draft trees: their shapes, passes over them against passes over each path, and what stays in the cache."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.tiny import class_gpt, text_gpt
from visar.drafters import DRAFTERS, SkippedLayers, drafter_kind, drafter_kinds
from visar.engine.drafter import Drafter, Timed
from visar.engine.guidance import Guidance
from visar.engine.tree import Tree
from visar.errors import VisarError
from visar.families.llamagen.drafting import LlamaGenTarget
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.session import LlamaGenSession
from visar.samplers import Speculative, Target, TreeSpeculative
from visar.samplers.tree_verification import (
    ChildRule,
    Chosen,
    Independent,
    Sampled,
    most_likely,
    sample_children,
    shared,
    verify_tree,
)
from visar.samplers.trees import named_tree, shape_of
from visar.samplers.verification import StepNoise, sample, verify_block, verify_independent

GUIDANCE = Guidance(2.0)
CAPTIONS = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(7))
MASK = torch.arange(4) >= torch.tensor([[0], [2], [3]])  # 4, 2 and 1 valid slots
CLASSES = torch.tensor([0, 3, 6])
SHAPE = shape_of([(0,), (1,), (2,), (0, 0), (0, 1), (2, 0), (0, 1, 0), (0, 1, 1), (2, 0, 0)])


# Shapes


@pytest.mark.parametrize(
    ("name", "levels", "leaves", "fed"),
    [
        ("mc25", [4, 8, 8, 3, 2], 15, [4, 4, 1, 1]),
        ("ext57", [5, 13, 16, 14, 9], 33, [5, 7, 7, 5]),
        ("4x2x1", [4, 8, 8], 8, [4, 8]),
    ],
)
def test_published_trees(name: str, levels: list[int], leaves: int, fed: list[int]) -> None:
    shape = named_tree(name)
    tree = Tree.of(shape.parents)
    assert [n for _, n in sorted(Counter(tree.depths[0].tolist()).items())] == [1, *levels]
    assert sum(not c for c in shape.children) == leaves and shape.depth == len(levels)
    assert [len(r) for r in shape.expanded()] == [1, *fed]
    assert all(shape.children[node] for level in shape.expanded() for node in level)
    for node, children in enumerate(shape.children):
        assert all(shape.parents[c] == node for c in children)


def test_ancestors_are_the_path_to_the_root() -> None:
    parents = torch.tensor([[-1, 0, 0, 1, 3, 2], [-1, 0, 1, 2, 3, 4]])
    tree = Tree.of(parents)
    for row in range(2):
        for node in range(6):
            path, at = set(), node
            while at >= 0:
                path.add(at)
                at = int(parents[row, at])
            assert {i for i in range(6) if int(tree.ancestors[row, node]) >> i & 1} == path
            assert int(tree.depths[row, node]) == len(path) - 1
    later = tree.after(2)
    assert later.depths.tolist() == [[0, 1, *(d + 2 for d in row)] for row in tree.depths.tolist()]


@pytest.mark.parametrize(
    ("name", "message"),
    [("mc26", "Unknown tree 'mc26'. Did you mean 'mc25'"), ("4x0", "Unknown tree '4x0'"), ("8x8", "at most 63 nodes"),
     ("", "Unknown tree ''"), ("2x", "Unknown tree '2x'")],
)  # fmt: skip
def test_bad_trees(name: str, message: str) -> None:
    with pytest.raises(VisarError, match=message):
        TreeSpeculative(tree=name)
    with pytest.raises(VisarError, match="but not its parent, or not the sibling before it"):
        shape_of([(1,)])


# Passes


def session(kind: str, window: int, grid: int = 5) -> LlamaGenSession:
    """Three rows of a random model."""
    torch.manual_seed(3)
    model = text_gpt() if kind == "text" else class_gpt()
    torch.nn.init.normal_(model.output.weight)
    condition, mask = (CAPTIONS, MASK) if kind == "text" else (CLASSES, None)
    return LlamaGenSession(model, condition, mask, length=grid**2, window=window, guidance=GUIDANCE, aux_layers=(0,))


def advance(s: LlamaGenSession, tokens: Tensor, counts: list[int]) -> None:
    """Commit the first `counts` tokens of each row, one at a time; rows that have theirs wait."""
    for n in range(max(counts)):
        s.forward(tokens.gather(1, (s.lengths[:, None] - 1).clamp_min(0)))
        s.commit((torch.tensor(counts) > n).long())


@pytest.mark.parametrize("counts", [[0, 0, 0], [3, 4, 9], [21, 23, 24]], ids=["start", "row ends", "end"])
@pytest.mark.parametrize("kind", ["text", "class"])
def test_tree_pass_is_the_pass_of_every_path(kind: str, counts: list[int]) -> None:
    tree, nodes = Tree.of(SHAPE.parents), len(SHAPE.parents)
    tokens = torch.randint(24, (3, 25), generator=torch.Generator().manual_seed(0))
    s = session(kind, nodes)
    advance(s, tokens, counts)
    drafts = torch.randint(24, (3, nodes), generator=torch.Generator().manual_seed(1))
    drafts[:, :1] = tokens.gather(1, (s.lengths[:, None] - 1).clamp_min(0))
    whole = s.forward(drafts, tree)
    # The same tree in parts, level by level, as a drafter runs it.
    fresh = session(kind, nodes)
    advance(fresh, tokens, counts)
    parts = [fresh.forward(drafts[:, a:b], tree, a) for a, b in ((0, 1), (1, 4), (4, 7), (7, nodes))]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
    for node in range(nodes):
        path = [i for i in range(nodes) if int(tree.ancestors[0, node]) >> i & 1]
        chain = fresh.forward(drafts[:, path])
        assert torch.allclose(chain[:, -1], whole[:, node], atol=1e-5), node


@pytest.mark.parametrize("kind", ["text", "class"])
def test_what_is_kept_is_what_a_fresh_pass_writes(kind: str) -> None:
    tree, nodes = Tree.of(SHAPE.parents), len(SHAPE.parents)
    tokens = torch.randint(24, (3, 25), generator=torch.Generator().manual_seed(0))
    counts, paths = [4, 9, 2], [[1, 4, 8], [2, 5, -1], [-1, -1, -1]]  # nodes, by depth
    assert [[SHAPE.parents[n] for n in p if n > 0] for p in paths[:2]] == [[0, 1, 4], [0, 2]]
    s = session(kind, nodes)
    advance(s, tokens, counts)
    drafts = torch.randint(24, (3, nodes), generator=torch.Generator().manual_seed(1))
    drafts[:, :1] = tokens.gather(1, s.lengths[:, None] - 1)
    s.forward(drafts, tree)
    path = torch.tensor(paths)
    s.keep(path)
    accepted = (path > 0).sum(1)
    s.commit(accepted + 1)
    for row in range(3):
        kept = [n for n in paths[row] if n > 0]
        tokens[row, counts[row] : counts[row] + len(kept)] = drafts[row, kept]
    fresh = session(kind, nodes)
    advance(fresh, tokens, [c + int(a) + 1 for c, a in zip(counts, accepted, strict=True)])
    for row in range(6):
        end = s.prefix - 1 + int(s.lengths[row % 3])  # all but the last token, which was never fed
        for mine, other in ((s.cache.keys, fresh.cache.keys), (s.cache.values, fresh.cache.values)):
            assert torch.allclose(mine[:, row, : end - s.folded], other[:, row, : end - s.folded], atol=1e-5)
        assert s.features is not None and fresh.features is not None
        assert torch.allclose(s.features[row, : end + 1], fresh.features[row, : end + 1], atol=1e-5)


def untrained(name: str, target: LlamaGen) -> Any:
    if name == "skip":
        return SkippedLayers([1])
    model = drafter_kind(name).new(LlamaGenTarget(target, 5), depth=3, layers=1).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5) if p.ndim == 2 else None  # heads are born as the target's own
    return model


@pytest.mark.parametrize("kind", ["text", "class"])
@pytest.mark.parametrize("name", drafter_kinds())
def test_a_drafter_drafts_what_it_was_trained_to_draft(kind: str, name: str) -> None:
    """The distributions of the training pass are those of the drafter at work, on its cache, at every depth."""
    s = session(kind, 6)
    torch.manual_seed(4)
    condition, mask = (CAPTIONS, MASK) if kind == "text" else (CLASSES, torch.ones(3, 1))
    model, target = untrained(name, s.model), LlamaGenTarget(s.model, 5)
    s.drafter = drafter = DRAFTERS[name].attach(
        s, model, target, 3, 6, (condition, mask) if kind == "text" else (condition,)
    )
    tokens = torch.randint(24, (3, 25), generator=torch.Generator().manual_seed(0))
    loss_of = DRAFTERS[name].loss
    assert loss_of is not None
    loss = loss_of(model, target, GUIDANCE, Target(), depth=3)
    with torch.no_grad():
        target_pass = loss.run_target(condition, mask, tokens)
        draft_probs, hidden = list(loss.log_draft_probs(target_pass)), loss.steps(target_pass)
    read: list[torch.Tensor] = []

    def noted(logits: torch.Tensor) -> torch.Tensor:
        assert isinstance(drafter, Timed)
        last = drafter.inner.last_hidden()
        assert last is not None
        read.append(last)
        return logits

    steps = [1, 3, 4, 2, 4, 1]  # what each round accepts
    for count in steps:
        n = int(s.lengths[0])
        read.clear()
        logits = [noted(drafter.root(tokens, s.lengths))]
        logits += [noted(drafter.extend(tokens[:, n + k - 1 : n + k], None, k)) for k in (1, 2)]
        for k, found in enumerate(logits):
            probs = draft_probs[min(k, len(draft_probs) - 1)]
            assert torch.allclose(found[:, 0].log_softmax(-1), probs[:, n + k], atol=1e-4), (n, k)
            assert torch.allclose(read[k][:, 0], hidden[min(k, len(hidden) - 1)][:3, n + k], atol=1e-4), (n, k)
        root = tokens[:, max(n - 1, 0) : max(n - 1, 0) + 1]
        s.forward(torch.cat([root, tokens[:, n : n + 4]], dim=1))
        s.commit(torch.full((3,), count))
    assert drafter.seconds > 0 and drafter.bytes_read > 0


@pytest.mark.parametrize("name", drafter_kinds())
def test_a_node_is_drafted_as_the_end_of_a_chain(name: str) -> None:
    """A drafter gives the same distribution behind a node of a tree as behind the chain of tokens that leads there."""
    torch.manual_seed(4)
    tokens = torch.randint(24, (3, 25), generator=torch.Generator().manual_seed(0))
    drafts = torch.randint(24, (3, len(SHAPE.parents)), generator=torch.Generator().manual_seed(1))
    model: Any = None

    def started() -> tuple[Drafter, torch.Tensor]:
        nonlocal model
        s = session("text", 12)
        model = model or untrained(name, s.model)
        drafter = DRAFTERS[name].attach(s, model, LlamaGenTarget(s.model, 5), 3, 12, (CAPTIONS, MASK))
        drafter.root(tokens, s.lengths)
        s.forward(torch.cat([tokens[:, :1], tokens[:, :4]], dim=1))
        s.commit(torch.full((3,), 3))
        return drafter, drafter.root(tokens, s.lengths)

    drafter, _ = started()
    tree, found = Tree.of(SHAPE.parents), {}
    for level in SHAPE.expanded()[1:]:
        logits = drafter.extend(drafts[:, level.start : level.stop], tree, level.start)
        found |= {node: logits[:, i] for i, node in enumerate(level)}
    assert len(found) > 3
    for node, logits in found.items():
        path = [node]
        while SHAPE.parents[path[0]] > 0:
            path.insert(0, SHAPE.parents[path[0]])
        chain, _ = started()
        for depth, at in enumerate(path, start=1):
            wanted = chain.extend(drafts[:, at : at + 1], None, depth)
        assert torch.allclose(logits, wanted[:, 0], atol=1e-4), node


# Rules


def random_probs(vocab: int = 5) -> Tensor:
    return (torch.randn(2, vocab, generator=torch.Generator().manual_seed(8)) * 1.5).softmax(-1)


def level(
    rule: ChildRule, children: int, draft_probs: Tensor | None = None, rows: int = 200_000
) -> tuple[np.ndarray, np.ndarray, float]:
    """The distribution of the first token after a root: as found, as it should be; and the acceptance rate."""
    g = torch.Generator().manual_seed(8)
    p, q = random_probs() if draft_probs is None else draft_probs
    vocab = len(p)
    u = torch.rand(rows, 2 * children + 3, generator=g, dtype=torch.float64)
    p, q = p.expand(rows, children + 1, -1), q.expand(rows, children + 1, -1)
    tokens = torch.zeros(rows, children + 1, dtype=torch.long)
    if isinstance(rule, Sampled):
        tokens[:, 1:] = sample_children(q[:, 0], u[:, :children])
    elif isinstance(rule, Independent):
        tokens[:, 1:] = sample(q[:, 1:], u[:, :children])
    else:
        tokens[:, 1:] = q[0, 0].topk(children).indices
    table = torch.full((1, children + 1, children), -1)
    table[0, 0] = torch.arange(1, children + 1)
    noise = StepNoise(u[:, children : 2 * children + 1], u[:, -2:])
    verified = verify_tree(p, q, tokens, table, 1, noise, rule)
    counts = torch.bincount(verified.tokens[:, 0], minlength=vocab)
    return (counts / rows).numpy(), p[0, 0].numpy(), verified.accepted.double().mean().item()


@pytest.mark.parametrize("rule", [Sampled(), Chosen()], ids=["sampled", "chosen"])
def test_one_level_has_the_target_distribution(rule: ChildRule) -> None:
    shares = []
    for children in (1, 2, 4, 5):
        found, wanted, accepted = level(rule, children)
        assert np.abs(found - wanted).sum() / 2 < 0.004
        shares.append(accepted)
    assert shares == sorted(shares) and shares[-1] > 0.999  # all five tokens are children: one of them must stand


def test_independent_children_have_the_target_distribution() -> None:
    shares = []
    for children in (1, 2, 4, 5):
        found, wanted, accepted = level(Independent(), children)
        assert np.abs(found - wanted).sum() / 2 < 0.004
        shares.append(accepted)
    p, q = random_probs()
    assert shares == sorted(shares) and shares[0] == pytest.approx(torch.minimum(p, q).sum().item(), abs=0.003)


@pytest.mark.parametrize("children", [1, 2, 3, 8])
def test_what_children_share_out_is_no_more_than_there_is(children: int) -> None:
    """rho is the smallest divisor, found here by a fine search; what k children take then leaves no debt."""
    draft_probs = (torch.randn(6, 2, 9, generator=torch.Generator().manual_seed(3)) * 1.5).double().softmax(-1)
    p, q = draft_probs.unbind(1)
    share = shared(p, q, torch.full((6,), children))
    taken = share.sum(-1, keepdim=True)
    left = p - share * (1 - (1 - taken) ** children) / taken
    assert bool((left > -1e-12).all()) and torch.allclose(left.sum(-1), (1 - taken[:, 0]) ** children)
    for row in range(6):
        for rho in torch.linspace(1, children, 2000).tolist():
            b = torch.minimum(q[row], p[row] / rho).sum().item()
            if 1 - (1 - b) ** children <= rho * b:
                break
        assert torch.allclose(share[row], torch.minimum(q[row], p[row] / rho), atol=1e-3)


def test_a_draft_distribution_that_is_nearly_a_point_leaves_a_rest_that_counts() -> None:
    draft_probs = torch.tensor([[0.4, 0.1, 0.5], [1 - 1e-8, 5e-9, 5e-9]])
    for children in (2, 3):
        found, wanted, _ = level(Sampled(), children, draft_probs)
        assert np.abs(found - wanted).sum() / 2 < 0.004


def test_children_are_sampled_without_replacement() -> None:
    q = torch.tensor([0.5, 0.3, 0.2, 0.0]).expand(100_000, -1)
    u = torch.rand(100_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = sample_children(q, u)
    assert (found[:, 3] == -1).all() and (found[:, :3].sort(-1).values == torch.arange(3)).all()
    assert (found[:, 0] == 0).double().mean().item() == pytest.approx(0.5, abs=0.01)
    first_b = found[found[:, 0] == 1]
    assert (first_b[:, 1] == 0).double().mean().item() == pytest.approx(5 / 7, abs=0.01)


def test_block_verification_keeps_at_least_as_much() -> None:
    g = torch.Generator().manual_seed(1)
    rows, gamma, vocab = 100_000, 4, 4
    p, q = ((torch.randn(gamma + 1, vocab, generator=g)).softmax(-1).expand(rows, -1, -1) for _ in range(2))
    q = q[:, :gamma]
    drafts = torch.stack([torch.multinomial(q[0, i], rows, True, generator=g) for i in range(gamma)], 1)
    noise = StepNoise(*torch.rand(2, rows, gamma + 1, generator=g, dtype=torch.float64))
    token, block = (
        rule(p, q, drafts, noise).accepted.double().mean().item() for rule in (verify_independent, verify_block)
    )
    assert block > token + 0.02


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Speculative(gamma=0), "gamma must be 1 or more"),
        (lambda: Speculative(verification="all"), "'all'"),  # type: ignore[arg-type]
        (lambda: TreeSpeculative(children="best"), "'best'"),
    ],  # type: ignore[arg-type]
)
def test_bad_parameters(make, message: str) -> None:
    with pytest.raises(VisarError, match=message):
        make()


def test_of_equal_tokens_the_first_are_the_most_likely() -> None:
    """Also where a device's `topk` takes others, as with thousands of equal ones."""
    q = torch.zeros(2, 5000)
    q[0, ::2], q[1, 7], q[1, 3000:] = 0.125, 0.5, 0.25
    assert most_likely(q, 4).tolist() == [[0, 2, 4, 6], [7, 3000, 3001, 3002]]
    assert most_likely(torch.tensor([[0.0, 0.1, 0.0]]), 3).tolist() == [[1, 0, 2]]
