"""EAGLE: one decoder layer that predicts the target's next hidden state (Li et al. 2024, arXiv:2401.15077).

It reads a token's embedding next to the hidden state one step before it, and borrows the target's output head. The
norms, the auxiliary layers and the training on its own predictions are those of EAGLE-3 (Li et al. 2025,
arXiv:2503.01840).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Interval, Len
from torch import Tensor, nn

from visar.drafters import lantern
from visar.drafters.base import DrafterTarget, DraftKind, check_fit, fingerprint, register_drafter
from visar.drafters.loss import DraftLoss, TargetPass, attention, later
from visar.engine.component import Component, fill, unfilled
from visar.engine.decoder import Attend
from visar.engine.drafter import Drafter
from visar.engine.feature_session import FeatureSession
from visar.engine.finite import require_finite
from visar.engine.kv_cache import KVCache
from visar.engine.layers import Linear, RMSNorm
from visar.engine.memory import streamed_bytes
from visar.engine.tree import Tree
from visar.errors import VisarError
from visar.families.llamagen.gpt import Block
from visar.reading import Size


class EagleHead(Component):
    """`fc` joins embedding and hidden state, both [B, W, dim]; one block follows.

    `aux_layers` are layers of the target whose outputs are fused with its last hidden state into the one that is read;
    `target` is the fingerprint of the model that it was trained for. LANTERN's released ones (`visar.drafters.lantern`)
    have no norms around the block. Those for LlamaGen have `codes`: no norm before attention either, a token embedding
    of their own, and code 0 instead of a caption. Those for Chameleon have norms of queries and keys (`qk_norm`).
    """

    kind = "eagle"

    def __init__(
        self,
        dim: Size = 1280,
        num_heads: Size = 20,
        ffn: Size = 3584,
        aux_layers: Annotated[Sequence[int], Len(0, 64)] = (),
        target: str = "",
        codes: Annotated[int, Interval(ge=0, le=2**24)] = 0,
        qk_norm: bool = False,
    ):
        super().__init__()
        bare = bool(codes) or qk_norm
        self.fusion = Linear(dim * (1 + len(aux_layers)), dim, bias=False) if aux_layers else None
        self.embedding = nn.Embedding(codes, dim) if codes else None
        self.embedding_norm, self.feature_norm, self.norm = (nn.Identity() if bare else RMSNorm(dim) for _ in range(3))
        self.fc = Linear(2 * dim, dim)
        self.block = Block(dim, num_heads, ffn)
        self.qk_norm = QKNorm(num_heads, dim // num_heads) if qk_norm else None
        if codes:
            self.block.attention_norm = nn.Identity()  # type: ignore[assignment]
            self.block.ffn_norm.eps = 1e-6

    @property
    def head_dim(self) -> int:
        return self.config.dim // self.config.num_heads

    @property
    def released(self) -> bool:
        """Whether it is one of LANTERN's, which have nothing in the slot of the first input."""
        return bool(self.config.codes) or self.qk_norm is not None

    def fuse(self, hidden: Tensor) -> Tensor:
        """What is read of the target's hidden states [B, W, dim * (1 + aux_layers)]: [B, W, dim]."""
        return hidden if self.fusion is None else self.fusion(hidden.to(self.dtype))

    def forward(self, embeddings: Tensor, hidden: Tensor, table: Tensor, attend: Attend) -> Tensor:
        """Predicted hidden states [B, W, dim]; `norm` of them goes into the target's head.

        `hidden`, fused or its own, are those one step before the embeddings, `table` the rotary rows of the embeddings'
        own slots.
        """
        x = self.fc(torch.cat([self.embedding_norm(embeddings), self.feature_norm(hidden)], dim=-1))
        norm = self.qk_norm
        own = attend if norm is None else lambda layer, qkv, table: attend(layer, norm(qkv), table)
        return self.block(x, table, own, 0)


class QKNorm(nn.Module):
    """Layer norms of queries and keys over each head, with weights of its own for each."""

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2 * heads, head_dim))
        self.bias = nn.Parameter(torch.zeros(2 * heads, head_dim))

    def forward(self, qkv: Tensor) -> Tensor:
        """qkv [..., 3 * heads, head_dim]."""
        qk, v = qkv.split([len(self.weight), qkv.shape[-2] - len(self.weight)], dim=-2)
        return torch.cat([F.layer_norm(qk, qk.shape[-1:]) * self.weight + self.bias, v], dim=-2)


class EagleDrafter(Drafter):
    """Drafts up to `depth` tokens deep. The session must store its hidden states.

    Slot s of the drafter holds the token at the target's slot s next to the target's hidden state at s - 1, and
    predicts the token after s. A pass feeds the last `depth` + 1 slots again: all that the pass before accepted, now
    with true hidden states. Its drafts lie after the root as in the target's cache, and the next pass overwrites them.
    """

    def __init__(self, session: FeatureSession, model: EagleHead, depth: int):
        if session.features is None:
            raise VisarError("A session with an EAGLE drafter must be made with its aux_layers.")
        self.session, self.model, self.depth = session, model, depth
        rows, slots = len(session.features), session.features.shape[1] - 1
        c = model.config
        self.cache = KVCache(1, rows, slots, c.num_heads, model.head_dim, model.dtype, session.device)
        self.drafted = torch.zeros(rows, 0, c.dim, dtype=model.dtype, device=session.device)  # one for each node fed
        self._fusion = 0 if model.fusion is None else streamed_bytes(model.fusion)
        self._weights = streamed_bytes(model) + session.head_bytes - self._fusion
        self._prefill()

    def _prefill(self) -> None:
        """Run the condition slots before the last, which the session has hidden states of."""
        session, model, before = self.session, self.model, self.session.condition.shape[1] - 1
        if not before:
            return
        assert session.features is not None
        at = torch.arange(before, device=session.device).expand(len(session.condition), -1)
        condition = session.condition[:, :-1]
        if model.embedding is not None:
            condition = model.embedding(torch.zeros_like(at))
        self._run(condition, model.fuse(session.features[:, :before]), at, at, self._mask(at, before))
        self.bytes_read = 0

    def start(self, *condition: Tensor) -> None:
        super().start(*condition)
        self._prefill()

    def root(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        s = self.session
        back = torch.arange(-self.depth, 1, device=s.device)
        positions = (s.lengths[:, None] + back).clamp_min(0)  # clamped ones say the same thing twice
        if self.model.embedding is None:
            x = s.embedded(tokens, positions)
        else:
            known = tokens.gather(1, (positions - 1).clamp_min(0))
            x = self._embedded(torch.where(positions == 0, 0, known))
        slots = s.first_slots() + positions.repeat(s.batches, 1)
        assert s.features is not None
        hidden = self.model.fuse(s.features[s.cache.rows, slots])
        self.bytes_read += self._fusion
        h = self._run(x, hidden, slots, slots, self._mask(slots, s.visible(1)))
        self.drafted = h[:, -1:]
        return self._logits(self.drafted, s.positions(1))

    def extend(self, tokens: Tensor, tree: Tree | None, first: int) -> Tensor:
        s, count = self.session, tokens.shape[1]
        x = self._embedded(tokens)
        if tree is None:
            parents = torch.arange(first - 1, first + count - 1, device=s.device).expand(len(x), -1)
        else:
            parents = tree.parents[:, first : first + count].expand(s.batch, -1).repeat(s.batches, 1)
        hidden = self.drafted.gather(1, parents[..., None].expand(-1, -1, self.drafted.shape[-1]))
        slots = s.first_slots() + s.follows(count, None, first).repeat(s.batches, 1)
        at = s.first_slots() + s.follows(count, tree, first).repeat(s.batches, 1)
        h = self._run(x, hidden, slots, at, self._mask(slots, s.visible(first + count), tree, first))
        # Leaves of the level before were not fed, and nothing asks for what would follow them.
        gap = self.drafted.new_zeros(len(x), first - self.drafted.shape[1], h.shape[-1])
        self.drafted = torch.cat([self.drafted, gap, h], dim=1)
        return self._logits(h, s.follows(count, tree, first))

    def place(self, row: int, fresh: EagleDrafter) -> None:
        self.cache.place(self.session.rows_of(row), fresh.cache)

    def select(self, rows: Tensor) -> None:
        self.cache.select(self.session.rows_of(rows))

    def drop_unconditional(self) -> None:
        self.cache.select(torch.arange(len(self.session.condition), device=self.session.device))

    def check(self) -> None:
        require_finite(self.drafted, "The drafter's hidden states", self.model.dtype)

    def _embedded(self, tokens: Tensor) -> Tensor:
        embedding = self.model.embedding or self.session.token_embeddings
        return embedding(tokens).repeat(self.session.batches, 1, 1)

    def _mask(self, slots: Tensor, visible: int, tree: Tree | None = None, first: int = 0) -> Tensor:
        mask = self.session.attention_mask(slots, visible, tree, first)
        slot, own = torch.arange(visible, device=mask.device), slots[..., None]
        if self.model.embedding is not None:
            mask = mask | (slot <= self.session.first_slots()[..., None]) & (slot <= own)
        if self.model.released:
            mask = mask & ((slot > 0) | (own == 0))  # nothing comes before the first hidden state
        return mask

    def _run(self, x: Tensor, hidden: Tensor, slots: Tensor, at: Tensor, mask: Tensor) -> Tensor:
        self.bytes_read += self._weights + len(x) * mask.shape[-1] * self.cache.bytes_per_slot
        return self.model(x, hidden, self.session.rotary_rows(at), self.cache.attend(slots, mask, mask.shape[-1]))

    def last_hidden(self) -> Tensor:
        return self._read[: self.session.batch]

    def _logits(self, hidden: Tensor, positions: Tensor) -> Tensor:
        self._read = self.model.norm(hidden)
        return self.session.guided(self.session.logits(self._read), positions)


class EagleLoss(DraftLoss[EagleHead]):
    """Unrolled on its own predictions: EAGLE-3's training-time test (Li et al. 2025, arXiv:2503.01840)."""

    def steps(self, target_pass: TargetPass) -> list[Tensor]:
        out: list[Tensor] = []
        keys: list[Tensor] = []
        values: list[Tensor] = []
        before = self.drafter.fuse(target_pass.hidden)
        back, rows = target_pass.distance, len(target_pass.x)
        for step in range(self.depth):
            # Of the true hidden states, all that are `step` slots back; of each prediction since, the slot on the way.
            masks = [(back >= step) & target_pass.valid[:, None] | ((back == 0) & (step == 0))]
            masks += [(back == step - j).expand(rows, -1, -1) for j in range(1, step + 1)]
            before = self.drafter(target_pass.x, later(before, 1), target_pass.table, attention(masks, keys, values))
            out.append(self.drafter.norm(before[:, target_pass.prefix - 1 :]))
        return out


@register_drafter("eagle")
class Eagle(DraftKind):
    network, loss = EagleHead, EagleLoss

    def published(self, state: Mapping[str, Tensor], target: DrafterTarget, path: str | Path) -> EagleHead | None:
        if not lantern.is_published(state):
            return None
        own, sizes = lantern.converted(state, target.model.head_dim, path)
        with unfilled():
            made = EagleHead(**sizes)
        return fill(made, own, path)

    def check(self, model: EagleHead, target: DrafterTarget, path: str | Path) -> None:
        own, its = model.config, target.model.config
        check_fit(model, target, path, own.aux_layers)
        if (own.codes and not target.layered) or (own.qk_norm and target.layered):
            raise VisarError(f"The drafter {path} is for {'LlamaGen' if own.codes else 'Anole or Lumina-mGPT'}.")
        if own.codes and own.codes != its.vocab_size:
            raise VisarError(f"The drafter {path} has {own.codes} codes, the target {its.vocab_size}.")

    def new(self, target: DrafterTarget, depth: int, layers: int) -> EagleHead:
        """It starts as the target's last block, if that is visar's, and reads its last hidden state alone."""
        c = target.model.config
        middle = sorted({c.num_layers // 4, c.num_layers // 2} - {c.num_layers - 1})
        made = EagleHead(c.dim, c.num_heads, c.ffn, aux_layers=tuple(middle), target=fingerprint(target.model))
        nn.init.normal_(made.fc.weight, std=made.fc.in_features**-0.5)
        nn.init.zeros_(made.fc.bias)
        if made.fusion is not None:
            nn.init.eye_(made.fusion.weight)
        if target.layered:
            made.block.load_state_dict(target.model.layers[-1].state_dict())
        else:  # it starts as nothing but `fc`
            nn.init.zeros_(made.block.attention.wo.weight)
            nn.init.zeros_(made.block.feed_forward.w2.weight)
        made.norm.load_state_dict(target.model.norm.state_dict())
        return made

    def aux_layers(self, model: EagleHead) -> tuple[int, ...]:
        return tuple(model.config.aux_layers)

    def drafter(self, session: FeatureSession, model: EagleHead, depth: int) -> EagleDrafter:
        return EagleDrafter(session, model, depth)
