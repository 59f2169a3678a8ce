"""Draft heads on the target's hidden state, head i for the token i after the root.

Medusa's (Cai et al. 2024, arXiv:2401.10774) read nothing but the hidden state one slot before the root; Hydra's (Ankner
et al. 2024, arXiv:2402.05109) read the root and the draft tokens on the way as well.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from visar.drafters.base import DrafterTarget, DraftKind, check_fit, fingerprint, register_drafter
from visar.drafters.loss import DraftLoss, TargetPass, later
from visar.engine.component import Component
from visar.engine.drafter import Drafter
from visar.engine.feature_session import FeatureSession
from visar.engine.finite import require_finite
from visar.engine.layers import Linear, RMSNorm
from visar.engine.memory import streamed_bytes
from visar.engine.tree import Tree
from visar.errors import VisarError
from visar.reading import Count, Size


class DraftHeads(Component):
    """`depth` residual blocks of two matrices; before training all give the target's own distribution of the root.

    `reads_tokens` makes them Hydra's; `target` is the fingerprint of the model that they were trained for.
    """

    def __init__(self, dim: Size = 1280, depth: Count = 5, reads_tokens: bool = False, target: str = ""):
        super().__init__()
        self.embedding_norm = RMSNorm(dim) if reads_tokens else None
        self.inner = nn.ModuleList(Linear(dim * (2 + i if reads_tokens else 1), dim) for i in range(depth))
        self.outer = nn.ModuleList(Linear(dim, dim, bias=False) for _ in range(depth))
        for p in self.outer.parameters():
            nn.init.zeros_(p)

    @property
    def kind(self) -> str:
        return "hydra" if self.config.reads_tokens else "medusa"

    def forward(self, hidden: Tensor, path: list[Tensor]) -> Tensor:
        """What the target's output head reads, [B, M, dim], for the token after the last of `path`.

        `hidden` [B, M, dim] are the normed ones before the root; `path` the embeddings, [B, M, dim] each, of the root
        and of the draft tokens after it.
        """
        i = len(path) - 1
        x = [hidden]
        if self.embedding_norm is not None:
            x += [self.embedding_norm(e) for e in path]
        read = torch.cat(x, dim=-1).to(self.dtype)
        return hidden + self.outer[i](nn.functional.silu(self.inner[i](read)))


class HeadsDrafter(Drafter):
    """Drafts up to `depth` tokens deep, without a cache. The session must store its hidden states."""

    def __init__(self, session: FeatureSession, model: DraftHeads, depth: int):
        if session.features is None:
            raise VisarError("A session with draft heads must be made with aux_layers.")
        if depth > model.config.depth:
            raise VisarError(f"The drafter has {model.config.depth} heads and cannot draft {depth} tokens deep.")
        self.session, self.model = session, model
        norm = [model.embedding_norm] if model.embedding_norm is not None else []
        own = [streamed_bytes(model.inner[i], model.outer[i], *norm) for i in range(depth)]
        self._weights = [session.head_bytes + weights for weights in own]

    def root(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        s = self.session
        assert s.features is not None
        root = s.lengths[:, None]
        hidden = s.features[
            s.cache.rows, s.first_slots() + root.repeat(s.batches, 1)
        ]  # one slot late: of the one before
        self.hidden = hidden[..., : self.model.config.dim]
        self.path, self.first = [s.embedded(tokens, root)], 0
        return self._logits(s.positions(1))

    def extend(self, tokens: Tensor, tree: Tree | None, first: int) -> Tensor:
        s, count = self.session, tokens.shape[1]
        x = s.token_embeddings(tokens).repeat(s.batches, 1, 1)
        if tree is None:
            above = torch.zeros(len(x), count, 1, dtype=torch.long, device=s.device)
        else:
            # The level before was given from its first node on, and those that were not have no children.
            parents = tree.parents[:, first : first + count].expand(s.batch, -1).repeat(s.batches, 1)
            above = (parents - self.first)[..., None]
        self.path = [p.gather(1, above.expand(-1, -1, p.shape[-1])) for p in self.path] + [x]
        self.first = first
        return self._logits(s.follows(count, tree, first))

    def check(self) -> None:
        require_finite(self._last, "The drafter's hidden states", self.model.dtype)

    def last_hidden(self) -> Tensor:
        return self._last[: self.session.batch]

    def _logits(self, positions: Tensor) -> Tensor:
        self.bytes_read += self._weights[len(self.path) - 1]
        self._last = self.model(self.hidden.expand(-1, self.path[0].shape[1], -1), self.path)
        return self.session.guided(self.session.logits(self._last), positions)


class HeadsLoss(DraftLoss[DraftHeads]):
    """Head i from the hidden state before the root, and the embeddings of the root and the i - 1 tokens after it."""

    def steps(self, target_pass: TargetPass) -> list[Tensor]:
        embeddings = [later(target_pass.x, back)[:, target_pass.prefix - 1 :] for back in range(self.depth)]
        return [
            self.drafter(later(target_pass.hidden, i + 1)[:, target_pass.prefix - 1 :], embeddings[i::-1])
            for i in range(self.depth)
        ]


@register_drafter("medusa", "hydra")
class Heads(DraftKind):
    network, loss = DraftHeads, HeadsLoss

    def check(self, model: DraftHeads, target: DrafterTarget, path: str | Path) -> None:
        check_fit(model, target, path)

    def new(self, target: DrafterTarget, depth: int, layers: int) -> DraftHeads:
        mark = fingerprint(target.model)
        return DraftHeads(target.model.config.dim, depth, reads_tokens=self.name == "hydra", target=mark)

    def aux_layers(self, model: DraftHeads) -> tuple[int, ...]:
        return ()

    def drafter(self, session: FeatureSession, model: DraftHeads, depth: int) -> HeadsDrafter:
        return HeadsDrafter(session, model, depth)
