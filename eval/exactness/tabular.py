"""Target models small enough to enumerate: a table of logits for every prefix, as a Session."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from visar.engine.guidance import Guidance
from visar.engine.session import Session
from visar.engine.tree import Tree


@dataclass(frozen=True)
class TabularModel:
    """Logits of the next token after every prefix; the prefix (x_0..x_{L-1}) is row offset[L] + its value base V.

    `cond` and `uncond` [rows, V] are the conditional and unconditional logits that guidance combines.
    """

    vocab: int
    length: int
    cond: Tensor
    uncond: Tensor

    @staticmethod
    def full_prefix(vocab: int, length: int, seed: int, spread: float = 1.2) -> TabularModel:
        """Independent normal logits for every prefix."""
        g = torch.Generator().manual_seed(seed)
        rows = sum(vocab**n for n in range(length))
        cond = torch.randn(rows, vocab, generator=g) * spread
        return TabularModel(vocab, length, cond, cond + torch.randn(rows, vocab, generator=g) * spread / 2)

    def disturbed(self, seed: int, spread: float = 0.8) -> TabularModel:
        """A draft model: the logits of this one with normal noise on them."""
        g = torch.Generator().manual_seed(seed)
        cond, uncond = (t + torch.randn(t.shape, generator=g) * spread for t in (self.cond, self.uncond))
        return TabularModel(self.vocab, self.length, cond, uncond)

    @staticmethod
    def markov(vocab: int, length: int, seed: int, spread: float = 1.2) -> TabularModel:
        """Order 2: the logits depend on the last two tokens only, so drafts with a wrong past are often right."""
        g = torch.Generator().manual_seed(seed)
        tables = [torch.randn((vocab + 1) ** 2, vocab, generator=g) * s for s in (spread, spread / 2)]
        last = [
            sum((t + 1) * (vocab + 1) ** k for k, t in enumerate(reversed(prefix[-2:])))
            for n in range(length)
            for prefix in itertools.product(range(vocab), repeat=n)
        ]
        return TabularModel(vocab, length, tables[0][last], tables[0][last] + tables[1][last])


class TabularSession(Session):
    """Decode a `TabularModel`. Its `history` is a cache: a pass overwrites what it feeds, nothing is ever cleared.

    Slot n holds the token fed at position n - 1, slot 0 the condition; the nodes of a tree lie one
    after the other from the root's slot on, as in the cache of a transformer.
    """

    def __init__(self, model: TabularModel, batch: int, window: int, guidance: Guidance = Guidance()):
        super().__init__(batch, model.length, model.vocab)
        self.model, self.guidance, self.window = model, guidance, window
        self.history = torch.zeros(batch, model.length + window, dtype=torch.long)
        self._offsets = torch.tensor([sum(model.vocab**m for m in range(n)) for n in range(model.length)])

    def forward(self, tokens: Tensor, tree: Tree | None = None, first: int = 0) -> Tensor:
        count, vocab, length = tokens.shape[1], self.vocab, self.length
        self.history.scatter_(1, self.follows(count, None, first), tokens)
        tree = tree or Tree.of(torch.arange(-1, first + count - 1))
        # The row of a node: what its parent's history comes to, then its own token.
        prefix = torch.zeros(self.batch, dtype=torch.long)
        for n in range(length):
            prefix = torch.where(n < self.lengths, prefix * vocab + self.history[:, n + 1], prefix)
        values = [prefix.unsqueeze(1)]  # the root is the last of the prefix
        nodes = first + count
        fed = self.history.gather(1, self.positions(nodes).clamp_min(0))
        parents = tree.parents.expand(self.batch, -1)
        for j in range(1, nodes):
            above = torch.cat(values, dim=1).gather(1, parents[:, j : j + 1])
            values.append(above * vocab + fed[:, j : j + 1])
        positions = self.follows(count, tree, first)
        at = positions.clamp_max(length - 1)
        past = positions >= length  # distributions that are never asked for
        row = self._offsets[at] + torch.where(past, 0, torch.cat(values, dim=1)[:, first:])
        if not self.guidance.active:
            return self.model.cond[row]
        return self.guidance.combine(self.model.cond[row], self.model.uncond[row], positions)

    def place(self, row: int, fresh: Session) -> None:
        self.lengths[row] = 0
        self.history[row] = 0

    def select(self, rows: Tensor) -> None:
        self.batch, self.lengths, self.history = len(rows), self.lengths[rows], self.history[rows]
        if self.cells is not None:
            self.cells = self.cells[rows]

    def keep(self, path: Tensor) -> None:
        to = self.lengths[:, None] + torch.arange(1, path.shape[1] + 1)
        source = torch.where(path > 0, self.lengths[:, None] + path, to)
        self.history.scatter_(1, to, self.history.gather(1, source))


@dataclass(frozen=True)
class Settings:
    """A target distribution in words of its own: what `Target` and `Guidance` should come to."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    scale: float = 1.0
    interval: int = -1
    forced: tuple[int, ...] = ()
    allowed: tuple[int, ...] = ()  # all where empty


def reference_probs(cond: np.ndarray, uncond: np.ndarray, position: int, settings: Settings) -> np.ndarray:
    """The next-token distribution [V] in float64, written from the definitions and without any code of the samplers."""
    vocab = len(cond)
    if settings.forced and settings.forced[position] >= 0:
        return np.eye(vocab)[settings.forced[position]]
    guided = settings.scale != 1.0 and (settings.interval < 0 or position <= settings.interval + 1)
    logits = [
        u + settings.scale * (c - u) if guided else c for c, u in zip(cond.tolist(), uncond.tolist(), strict=True)
    ]
    weights = {v: math.exp(x / settings.temperature) for v, x in enumerate(logits)}
    ranked = sorted(settings.allowed or weights, key=lambda v: -weights[v])
    if settings.top_k:
        ranked = ranked[: settings.top_k]
    if settings.top_p < 1:
        total, mass, nucleus = sum(weights[v] for v in ranked), 0.0, []
        for v in ranked:
            nucleus.append(v)
            mass += weights[v] / total
            if mass > settings.top_p:
                break
        ranked = nucleus
    out = np.zeros(vocab)
    for v in ranked:
        out[v] = weights[v]
    return out / out.sum()


def joint(model: TabularModel, settings: Settings) -> np.ndarray:
    """The probability of every sequence, [V**N] float64, in the order of their values base V."""
    cond, uncond = model.cond.double().numpy(), model.uncond.double().numpy()
    probabilities = np.ones(1)
    offset = 0
    for position in range(model.length):
        size = model.vocab**position
        probs = np.stack(
            [
                reference_probs(cond[offset + i], uncond[offset + i], position, settings)
                if probabilities[i]
                else np.zeros(model.vocab)
                for i in range(size)
            ]
        )
        probabilities = (probabilities[:, None] * probs).reshape(-1)
        offset += size
    return probabilities
