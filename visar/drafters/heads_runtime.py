"""Draft heads at work on a LlamaGenSession: no cache, only the feature before the root and the tokens on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from visar.drafters.heads import DraftHeads
from visar.engine.drafter import Drafter
from visar.engine.session import require_finite
from visar.engine.tree import Tree
from visar.errors import VisarError
from visar.families.llamagen.session import LlamaGenSession


class HeadsDrafter(Drafter):
    """Drafts up to `depth` tokens deep. The session must keep its features."""

    def __init__(self, session: LlamaGenSession, model: DraftHeads, depth: int):
        if session.features is None:
            raise VisarError("A session with draft heads must be made with aux_layers.")
        if depth > model.config.depth:
            raise VisarError(f"The drafter has {model.config.depth} heads and cannot draft {depth} tokens deep.")
        self.session, self.model = session, model
        head = session.model.output.weight
        own = [[*model.inner[i].parameters(), *model.outer[i].parameters(), head] for i in range(depth)]
        self._weights = [sum(p.numel() * p.element_size() for p in each) for each in own]

    def root(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        s = self.session
        assert s.features is not None
        root = s.root_slots()[:, None]
        feature = s.features[s.cache.rows, root.repeat(s.halves, 1)]  # one slot late, so that of the slot before
        self.feature = feature[..., : self.model.config.dim]
        self.path, self.first = [s.embedded(tokens, root)], 0
        return self._logits(s.positions(1))

    def extend(self, tokens: Tensor, tree: Tree | None, first: int) -> Tensor:
        s, count = self.session, tokens.shape[1]
        x = s.model.tok_embeddings(tokens).repeat(s.halves, 1, 1)
        if tree is None:
            above = torch.zeros(len(x), count, 1, dtype=torch.long, device=s.device)
        else:
            # The level before was given from its first node on, and those that were not have no children.
            parents = tree.parents[:, first : first + count].expand(s.batch, -1).repeat(s.halves, 1)
            above = (parents - self.first)[..., None]
        self.path = [p.gather(1, above.expand(-1, -1, p.shape[-1])) for p in self.path] + [x]
        self.first = first
        return self._logits(s.follows(count, tree, first))

    def check(self) -> None:
        require_finite(self._last, "The drafter's features", self.model.dtype)

    def _logits(self, positions: Tensor) -> Tensor:
        self.bytes_read += self._weights[len(self.path) - 1]
        self._last = self.model(self.feature.expand(-1, self.path[0].shape[1], -1), self.path)
        return self.session.guided(self.session.model.logits(self._last), positions)
