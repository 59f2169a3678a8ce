"""Shapes of draft trees, by name: which children each node of a static tree has."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from visar.engine.tree import MOST_NODES
from visar.errors import VisarError, unknown

# Published shapes, as paths of child ranks: EAGLE-1's (Li et al. 2024, arXiv:2401.15077), and the wider one that
# LANTERN (Jang et al. 2024, arXiv:2410.03355) uses for LlamaGen.
MC25 = "0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 0000 0001 0002 00000 00001"
EXT57 = (
    "0 1 2 3 4 00 01 02 03 10 11 12 20 21 22 30 31 40 000 001 002 003 010 011 012 020 021 022 030 031 100 101 110 200 "
    "0000 0001 0002 0003 0010 0011 0012 0020 0021 0030 0100 0101 0110 0200 "
    "00000 00001 00002 00010 00011 00100 00101 00110 00200"
)
MOST_CHILDREN = 10  # a rank is a digit
TREES = {"mc25": MC25, "ext57": EXT57}


class Shape(NamedTuple):
    """A static tree: `parents` of the nodes, -1 for the root, and `children` of the nodes, in the order of drafting.

    Levels follow one another, and within a level nodes that have children come first: they are fed to the drafter.
    """

    parents: tuple[int, ...]
    children: tuple[tuple[int, ...], ...]

    @property
    def depth(self) -> int:
        """Levels below the root."""
        deepest = [0]
        for parent in self.parents[1:]:
            deepest.append(deepest[parent] + 1)
        return max(deepest)

    def expanded(self) -> list[range]:
        """The nodes with children, level by level; they are neighbours."""
        levels: list[list[int]] = [[0]]
        while below := [c for node in levels[-1] for c in self.children[node] if self.children[c]]:
            levels.append(below)
        return [range(min(level), max(level) + 1) for level in levels]


def shape_of(paths: Iterable[tuple[int, ...]]) -> Shape:
    """The tree given by its paths of child ranks, such as (0,), (1,), (0, 0)."""
    known = set(paths)
    inner = {p[:-1] for p in known}
    nodes = [(), *sorted(known, key=lambda p: (len(p), p not in inner, p))]
    index = {p: i for i, p in enumerate(nodes)}
    for p in known:
        if p[:-1] not in index or (p[-1] and (*p[:-1], p[-1] - 1) not in index):
            raise VisarError(f"The tree has the node {p} but not its parent, or not the sibling before it.")
    children: list[list[int]] = [[] for _ in nodes]
    for p in sorted(known):
        children[index[p[:-1]]].append(index[p])
    return Shape(tuple(index[p[:-1]] if p else -1 for p in nodes), tuple(map(tuple, children)))


def best_tree(acceptance: Sequence[Sequence[float]], nodes: int) -> str:
    """The tree of `nodes` drafts that is accepted deepest on average, as paths.

    `acceptance[d][r]`: how often the child of rank r, of an accepted node at depth d, is the one that is accepted. The
    gain of a draft is the product along its path, so the best ones are found one after the other.
    """
    found: list[tuple[int, ...]] = []
    open_paths: list[tuple[float, tuple[int, ...]]] = [(-acceptance[0][0], (0,))]
    while open_paths and len(found) < nodes:
        gain, path = heapq.heappop(open_paths)
        found.append(path)
        depth, rank = len(path) - 1, path[-1]
        if rank + 1 < min(len(acceptance[depth]), MOST_CHILDREN):
            above = gain / acceptance[depth][rank] if acceptance[depth][rank] else 0.0
            heapq.heappush(open_paths, (above * acceptance[depth][rank + 1], (*path[:-1], rank + 1)))
        if depth + 1 < len(acceptance):
            heapq.heappush(open_paths, (gain * acceptance[depth + 1][0], (*path, 0)))
    return " ".join("".join(map(str, path)) for path in sorted(found, key=lambda p: (len(p), p)))


def expected_tokens(shape: Shape, acceptance: Sequence[Sequence[float]]) -> float:
    """Tokens per pass of a tree whose children are accepted as `best_tree` says; one of them is not drafted."""
    gains, depths = [1.0], [0]
    ranks = {child: rank for below in shape.children for rank, child in enumerate(below)}
    for node in range(1, len(shape.parents)):
        parent = shape.parents[node]
        rates = acceptance[depths[parent]] if depths[parent] < len(acceptance) else []
        gains.append(gains[parent] * (rates[ranks[node]] if ranks[node] < len(rates) else 0.0))
        depths.append(depths[parent] + 1)
    return sum(gains)


def branching(*children: int) -> Shape:
    """The tree whose nodes of depth d have `children[d]` children each (RSD-C, Jeon et al. 2024, arXiv:2402.14160)."""
    depths = range(1, len(children) + 1)
    return shape_of(path for d in depths for path in itertools.product(*map(range, children[:d])))


def named_tree(name: str) -> Shape:
    """A tree by name: "mc25", "ext57", children per depth as in "4x2x1", or paths of child ranks as in "0 1 00".

    Raises `VisarError` for any other.
    """
    words = TREES.get(name, name).split()
    if words == ["0"] or (len(words) > 1 and all(word.isdecimal() for word in words)):
        if len(words) >= MOST_NODES:
            raise VisarError(
                f"A draft tree has at most {MOST_NODES} nodes with its root; this one has {len(words) + 1}."
            )
        return shape_of(tuple(map(int, word)) for word in words)
    parts = name.split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise unknown("tree", name, [*TREES, "children per depth as in 4x2x1", "paths as in '0 1 00'"])
    counts = [int(part) for part in parts]
    nodes = 1 + sum(math.prod(counts[:d]) for d in range(1, len(counts) + 1))
    if nodes > MOST_NODES:
        raise VisarError(f"A draft tree has at most {MOST_NODES} nodes with its root; {name} has {nodes}.")
    return branching(*counts)
