"""The Session over a plain function of token ids: no cache, so every pass runs the whole prefix.

The shortest way to decode a model of your own, and the reference for sessions with a cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from visar.engine.session import Session
from visar.engine.tree import Tree
from visar.errors import VisarError

# tokens [B, n], long -> logits [B, n + 1, V] of the positions 0..n, each given the tokens before it.
Logits = Callable[[Tensor], Tensor]


class CallableSession(Session):
    """Decode `length` tokens from `logits(tokens [B, n]) -> [B, n + 1, V]`, for 0 <= n < `length`.

    Position i may depend on the condition, which the function knows by itself, and on the tokens before i. The tokens
    from i on may be drafts. The function applies guidance itself. Trees are not supported. Raises `VisarError` if the
    function gives another shape.
    """

    def __init__(self, logits: Logits, batch: int, length: int, vocab: int, device: torch.device | str = "cpu"):
        super().__init__(batch, length, vocab, device)
        self.logits = logits
        self.history = torch.zeros(self.batch, self.length, dtype=torch.long, device=self.device)

    def forward(self, tokens: Tensor, tree: Tree | None = None, first: int = 0) -> Tensor:
        if tree is not None:
            raise VisarError("A CallableSession has no trees; use a sampler that drafts sequences.")
        at = self.follows(tokens.shape[1], None, first)
        # The input of position n is token n - 1. Position 0 has none, and inputs past the end are not needed.
        rows, inputs = torch.where((at > 0) & (at <= self.length))
        self.history[rows, at[rows, inputs] - 1] = tokens[rows, inputs]
        fed = min(int(at.max()), self.length - 1)
        logits = of_positions(self.logits(self.history[:, :fed]), (self.batch, fed + 1, self.vocab))
        return logits.gather(1, at.clamp_max(fed)[..., None].expand(-1, -1, self.vocab)).float()


def of_positions(logits: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The logits of n + 1 positions that a function gave. Raises `VisarError` unless they are [B, n + 1, V]."""
    if not isinstance(logits, Tensor) or logits.shape != shape:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        batch, positions, vocab = shape
        raise VisarError(
            f"The function of logits gave {found} for tokens [{batch}, {positions - 1}]; it must give [B, n + 1, V], "
            f"here [{batch}, {positions}, {vocab}], for the positions 0 to n."
        )
    return logits
