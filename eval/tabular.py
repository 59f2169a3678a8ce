"""Target models small enough to enumerate: a table of logits for every prefix, behind the Session interface."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from visar.engine.guidance import Guidance
from visar.engine.session import Session


@dataclass(frozen=True)
class TabularModel:
    """Logits of the next token after every prefix; the prefix (x_0..x_{L-1}) is row offset[L] + its value base V.

    `cond` and `uncond` [rows, V] are the two halves that guidance combines.
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
    """Decode a `TabularModel`. Its `history` is a cache: a pass overwrites what it feeds, nothing is ever cleared."""

    def __init__(self, model: TabularModel, batch: int, window: int, guidance: Guidance = Guidance()):
        super().__init__(batch, model.length, model.vocab)
        self.model, self.guidance = model, guidance
        self.history = torch.zeros(batch, model.length + window, dtype=torch.long)

    def forward(self, tokens: Tensor) -> Tensor:
        window, vocab, length = tokens.shape[1], self.vocab, self.length
        positions = self.positions(window)
        # Input k stands at position n - 1 + k; before the first token there is none.
        at = positions - 1
        kept = self.history.gather(1, at.clamp_min(0))
        self.history.scatter_(1, at.clamp_min(0), torch.where((at >= 0), tokens, kept) if window == 1 else tokens)
        if window > 1:  # with nothing committed, inputs 0 and 1 both landed on slot 0: input 1 is the draft
            empty = self.lengths == 0
            self.history[empty, 0] = tokens[empty, 1]
        rows = torch.zeros(self.batch, length, dtype=torch.long)
        value = torch.zeros(self.batch, dtype=torch.long)
        offset = 0
        for n in range(length):
            rows[:, n] = offset + value
            value = value * vocab + self.history[:, n]
            offset += vocab**n
        row = rows.gather(1, positions.clamp_max(length - 1))
        if not self.guidance.active:
            return self.model.cond[row]
        return self.guidance.combine(self.model.cond[row], self.model.uncond[row], positions)


@dataclass(frozen=True)
class Law:
    """A target law in words of its own: what `Target` and `Guidance` should come to."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    scale: float = 1.0
    interval: int = -1
    forced: tuple[int, ...] = ()


def reference_law(cond: np.ndarray, uncond: np.ndarray, position: int, law: Law) -> np.ndarray:
    """The next-token law [V] in float64, written from the definitions and without any code of the samplers."""
    vocab = len(cond)
    if law.forced and law.forced[position] >= 0:
        return np.eye(vocab)[law.forced[position]]
    guided = law.scale != 1.0 and (law.interval < 0 or position <= law.interval + 1)
    logits = [u + law.scale * (c - u) if guided else c for c, u in zip(cond.tolist(), uncond.tolist(), strict=True)]
    weights = {v: math.exp(x / law.temperature) for v, x in enumerate(logits)}
    ranked = sorted(weights, key=lambda v: -weights[v])
    if law.top_k:
        ranked = ranked[: law.top_k]
    if law.top_p < 1:
        total, mass, kept = sum(weights[v] for v in ranked), 0.0, []
        for v in ranked:
            kept.append(v)
            mass += weights[v] / total
            if mass > law.top_p:
                break
        ranked = kept
    out = np.zeros(vocab)
    for v in ranked:
        out[v] = weights[v]
    return out / out.sum()


def joint(model: TabularModel, law: Law) -> np.ndarray:
    """The probability of every sequence, [V**N] float64, in the order of their values base V."""
    cond, uncond = model.cond.double().numpy(), model.uncond.double().numpy()
    probabilities = np.ones(1)
    offset = 0
    for position in range(model.length):
        size = model.vocab**position
        laws = np.stack(
            [
                reference_law(cond[offset + i], uncond[offset + i], position, law)
                if probabilities[i]
                else np.zeros(model.vocab)
                for i in range(size)
            ]
        )
        probabilities = (probabilities[:, None] * laws).reshape(-1)
        offset += size
    return probabilities
