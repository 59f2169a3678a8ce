"""The EAGLE drafter at work on a LlamaGenSession: a cache of its own, fed with the target's true features."""

from __future__ import annotations

import torch
from torch import Tensor

from visar.drafters.eagle import EagleHead
from visar.engine.drafter import Drafter
from visar.engine.kv_cache import KVCache
from visar.engine.session import require_finite
from visar.engine.tree import Tree
from visar.errors import VisarError
from visar.families.llamagen.session import LlamaGenSession


class EagleDrafter(Drafter):
    """Drafts up to `depth` tokens deep. The session must keep its features.

    Slot s of the drafter holds the token at the target's slot s beside the target's feature at s - 1, and predicts what
    follows s. A round feeds the last `depth` + 1 slots again: all that the round before accepted, now with true
    features. What it drafts lies behind the root as in the target's cache, and is overwritten in the next round.
    """

    def __init__(self, session: LlamaGenSession, model: EagleHead, depth: int):
        if session.features is None:
            raise VisarError("A session with an EAGLE drafter must be made with its aux_layers.")
        self.session, self.model, self.depth = session, model, depth
        rows, slots = session.valid.shape
        c = model.config
        self.cache = KVCache(1, rows, slots, c.num_heads, model.head_dim, model.dtype, session.device)
        self.drafted = torch.zeros(rows, 0, c.dim, dtype=model.dtype, device=session.device)  # one for each node fed
        head = [p for n, p in model.named_parameters() if n != "embedding.weight"] + [session.model.output.weight]
        self._weights = sum(p.numel() * p.element_size() for p in head)
        self._prefill()

    def _prefill(self) -> None:
        """Run the condition slots before the last, which the session has features of."""
        session, model, before = self.session, self.model, self.session.prefix - 1
        if not before:
            return
        assert session.features is not None
        at = torch.arange(before, device=session.device).expand(len(session.condition), -1)
        features = model.fuse(session.features[:, :before])
        condition = session.condition[:, :-1]
        if model.embedding is not None:
            condition = model.embedding(torch.zeros_like(at))
        self._run(condition, features, at, at, self._sees(at, before))
        self.bytes_read = 0

    def start(self, *condition: Tensor) -> None:
        super().start(*condition)
        self._prefill()

    def root(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        s = self.session
        root = s.root_slots()[:, None]
        back = torch.arange(-self.depth, 1, device=s.device)
        slots = (root + back).clamp_min(s.prefix - 1)  # clamped ones say the same thing twice
        if self.model.embedding is None:
            x = s.embedded(tokens, slots)
        else:
            known = tokens.gather(1, (slots - s.prefix).clamp_min(0))
            x = self._embedded(torch.where(slots < s.prefix, 0, known))
        slots = slots.repeat(s.halves, 1)
        assert s.features is not None
        features = self.model.fuse(s.features[s.cache.rows, slots])
        h = self._run(x, features, slots, slots, self._sees(slots, s.visible(1)))
        self.drafted = h[:, -1:]
        return self._logits(self.drafted, s.positions(1))

    def extend(self, tokens: Tensor, tree: Tree | None, first: int) -> Tensor:
        s, count = self.session, tokens.shape[1]
        x = self._embedded(tokens)
        if tree is None:
            parents = torch.arange(first - 1, first + count - 1, device=s.device).expand(len(x), -1)
        else:
            parents = tree.parents[:, first : first + count].expand(s.batch, -1).repeat(s.halves, 1)
        features = self.drafted.gather(1, parents[..., None].expand(-1, -1, self.drafted.shape[-1]))
        slots = (s.follows(count, None, first) + s.prefix - 1).repeat(s.halves, 1)
        at = (s.follows(count, tree, first) + s.prefix - 1).repeat(s.halves, 1)
        h = self._run(x, features, slots, at, self._sees(slots, s.visible(first + count), tree, first))
        # Leaves of the level before were not fed, and nothing asks for what would follow them.
        gap = self.drafted.new_zeros(len(x), first - self.drafted.shape[1], h.shape[-1])
        self.drafted = torch.cat([self.drafted, gap, h], dim=1)
        return self._logits(h, s.follows(count, tree, first))

    def narrow(self) -> None:
        self.cache.keep_rows(len(self.session.condition))

    def check(self) -> None:
        require_finite(self.drafted, "The drafter's features", self.model.dtype)

    def _embedded(self, tokens: Tensor) -> Tensor:
        embedding = self.model.embedding or self.session.model.tok_embeddings
        return embedding(tokens).repeat(self.session.halves, 1, 1)

    def _sees(self, slots: Tensor, visible: int, tree: Tree | None = None, first: int = 0) -> Tensor:
        mask = self.session.sees(slots, visible, tree, first)
        if self.model.embedding is not None:
            slot, own = torch.arange(visible, device=mask.device), slots[..., None]
            mask = mask | (slot < self.session.prefix) & (slot <= own)
            mask &= (slot > 0) | (own == 0)  # nothing stands before the first feature
        return mask

    def _run(self, x: Tensor, features: Tensor, slots: Tensor, at: Tensor, mask: Tensor) -> Tensor:
        self.bytes_read += self._weights + len(x) * mask.shape[-1] * self.cache.bytes_per_slot
        return self.model(x, features, self.session.turned(at), self.cache.attend(slots, mask, mask.shape[-1]))

    def _logits(self, h: Tensor, positions: Tensor) -> Tensor:
        return self.session.guided(self.session.model.logits(self.model.norm(h)), positions)
