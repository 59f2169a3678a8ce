"""What drafters learn from: how far their guided laws are from the target's, after one step and after several.

Guidance, temperature and the images are those of use, and the loss is the divergence of the guided laws, which is
what acceptance depends on.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visar.drafters import DraftHeads, EagleHead, ExitHead, SkippedLayers
from visar.engine.decoder import Attend
from visar.engine.guidance import Guidance
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.rotary import turned
from visar.samplers.distribution import Target


class TargetPass(NamedTuple):
    """The target over whole sequences of S slots: both guidance halves, the conditional one first.

    `given`: condition, mask and tokens; `x` [rows, S, dim] embeddings; `features` [rows, S, dim * (1 + aux_layers)];
    `table`, their positions; `valid` [rows, S], of no padding; `back` [S, S], how far slot j lies behind slot i; `at`
    [B, n], the positions of the tokens; `p` [B, n, V], their laws.
    """

    given: tuple[Tensor, Tensor, Tensor]
    x: Tensor
    features: Tensor
    table: Tensor
    valid: Tensor
    back: Tensor
    at: Tensor
    p: Tensor

    def causal(self) -> Tensor:
        """Whether slot i sees slot j, [rows, S, S]; padding sees itself."""
        return (self.back >= 0) & self.valid[:, None] | (self.back == 0)


D = TypeVar("D", bound=nn.Module)


class DraftLoss(nn.Module, Generic[D]):
    """A drafter over whole sequences, `depth` tokens deep; the target is frozen and no part of it is saved."""

    def __init__(
        self, drafter: D, target: LlamaGen, guidance: Guidance, law: Target, depth: int, grid: int | None = None
    ):
        super().__init__()
        self.drafter = drafter
        self.depth, self.guidance, self.law, self.grid = depth, guidance, law, grid
        self.aux_layers = tuple(getattr(drafter.config, "aux_layers", ()))
        target.eval().requires_grad_(False)
        self._target = lambda: target  # no submodule: neither saved nor copied with the drafter

    @abstractmethod
    def steps(self, seen: TargetPass) -> list[Tensor]:
        """What the output head reads, [rows, n, dim], for the tokens drafted first, second, ... behind the root.

        Row i of step k is drafted k steps behind its root: from the target's features before it, and what was drafted
        since. Rows below k are of no root and count for nothing.
        """

    def forward(self, condition: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        """The loss: KL(p || q) + TV(p, q) of the guided laws, later steps weighing 0.8 of those before them."""
        seen = self.look(condition, mask, tokens)
        loss = seen.p.new_zeros(())
        for step, log_q in enumerate(self.laws(seen)):
            own, kept = seen.p[:, step:], log_q[:, step:]
            kl = (torch.xlogy(own, own) - own * kept).sum(-1)
            tv = (own - kept.exp()).abs().sum(-1) / 2
            loss = loss + 0.8**step * (kl + tv).mean()
        return loss

    @torch.no_grad()
    def acceptance(self, seen: TargetPass) -> list[float]:
        """The mean of 1 - TV of the laws as they are used, at each depth."""
        processed = (self.law.probs(log_q * self.law.temperature, seen.at) for log_q in self.laws(seen))
        return [torch.minimum(seen.p, q)[:, step:].sum(-1).mean().item() for step, q in enumerate(processed)]

    def laws(self, seen: TargetPass) -> Iterator[Tensor]:
        """Per step the draft law [B, n, V] of every token, in logs, before top-k and top-p."""
        for features in self.steps(seen):
            logits = self._guided(self.logits(features), seen.at)
            yield (logits / self.law.temperature).log_softmax(-1)

    def logits(self, features: Tensor) -> Tensor:
        """What the output head, by default the target's, makes of features: [rows, n, V], fp32."""
        target = self._target()
        return target.logits(features.to(target.dtype))

    @torch.no_grad()
    def look(self, condition: Tensor, mask: Tensor, tokens: Tensor) -> TargetPass:
        """The target over tokens [B, n] under their conditions."""
        target = self._target()
        at = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        x, prefix = self._embedded(target, condition, tokens), self.prefix
        slot = torch.arange(x.shape[1], device=x.device)
        valid = F.pad(mask.bool(), (0, len(slot) - prefix), value=True).repeat(len(x) // len(tokens), 1)
        table = target.rotary(self.grid)[: len(slot)].expand(len(x), -1, -1, -1)
        empty = x.new_zeros(())
        seen = TargetPass((condition, mask, tokens), x, empty, table, valid, slot[:, None] - slot, at, empty)
        features = target.run(x, table, attention([seen.causal()], [], []), self.aux_layers)
        p = self.law.probs(self._guided(target.logits(features[:, prefix - 1 :]), at), at)
        return seen._replace(features=features, p=p)

    @property
    def prefix(self) -> int:
        return self._target().config.condition_length

    def _embedded(self, model: LlamaGen, condition: Tensor, tokens: Tensor) -> Tensor:
        """What a model reads, [rows, S, dim]: the conditions of both halves, and all tokens but the last."""
        embed = model.cls_embedding
        parts = [embed(condition)] + ([embed(embed.null_like(condition))] if self.guidance.active else [])
        return torch.cat([torch.cat(parts), model.tok_embeddings(tokens[:, :-1]).repeat(len(parts), 1, 1)], dim=1)

    def _guided(self, logits: Tensor, at: Tensor) -> Tensor:
        if not self.guidance.active:
            return logits
        cond, uncond = logits.chunk(2)
        return self.guidance.combine(cond, uncond, at)


class EagleLoss(DraftLoss[EagleHead]):
    """Unrolled on its own predictions: EAGLE-3's training-time test (Li et al. 2025, arXiv:2503.01840)."""

    def steps(self, seen: TargetPass) -> list[Tensor]:
        out: list[Tensor] = []
        keys: list[Tensor] = []
        values: list[Tensor] = []
        before = self.drafter.fuse(seen.features)
        back, rows = seen.back, len(seen.x)
        for step in range(self.depth):
            # Of the true features, all that is `step` slots back; of each prediction since, the slot on the way here.
            masks = [(back >= step) & seen.valid[:, None] | ((back == 0) & (step == 0))]
            masks += [(back == step - j).expand(rows, -1, -1) for j in range(1, step + 1)]
            before = self.drafter(seen.x, later(before, 1), seen.table, attention(masks, keys, values))
            out.append(self.drafter.norm(before[:, self.prefix - 1 :]))
        return out


class HeadsLoss(DraftLoss[DraftHeads]):
    """Head i from the feature before the root, and the embeddings of the root and the i - 1 tokens behind it."""

    def steps(self, seen: TargetPass) -> list[Tensor]:
        embeddings = [later(seen.x, back)[:, self.prefix - 1 :] for back in range(self.depth)]
        return [
            self.drafter(later(seen.features, i + 1)[:, self.prefix - 1 :], embeddings[i::-1])
            for i in range(self.depth)
        ]


class ShallowLoss(DraftLoss[ExitHead | SkippedLayers]):
    """A drafter with a cache of its own drafts every token from the true ones before it: one step says it all."""

    def steps(self, seen: TargetPass) -> list[Tensor]:
        blocks, norm = self.drafter.blocks(self._target())
        x, attend = seen.x, attention([seen.causal()], [], [])
        for i, block in enumerate(blocks):
            x = block(x, seen.table, attend, i)
        return [norm(x[:, self.prefix - 1 :])]


class ModelLoss(DraftLoss[LlamaGen]):
    """A smaller model of the target's kind, with embeddings and a head of its own: the target is its teacher."""

    def steps(self, seen: TargetPass) -> list[Tensor]:
        condition, _, tokens = seen.given
        x, attend = self._embedded(self.drafter, condition, tokens), attention([seen.causal()], [], [])
        table = self.drafter.rotary(self.grid)[: x.shape[1]].expand(len(x), -1, -1, -1)
        return [self.drafter.run(x, table, attend)[:, self.prefix - 1 :]]

    def logits(self, features: Tensor) -> Tensor:
        return self.drafter.logits(features)


def later(x: Tensor, slots: int) -> Tensor:
    """x [rows, S, dim] moved `slots` back in time, zeros before it."""
    return F.pad(x, (0, 0, slots, 0))[:, : x.shape[1]]


def attention(seen: list[Tensor], keys: list[Tensor], values: list[Tensor]) -> Attend:
    """Attention over the keys and values of all passes so far, to which it adds its own; `seen` is a mask for each."""
    mask = torch.cat(seen, -1)[:, None]

    def attend(_: int, qkv: Tensor, table: Tensor) -> Tensor:
        q, k, v = turned(qkv, table)
        keys.append(k)
        values.append(v)
        q, k, v = (t.transpose(1, 2) for t in (q, torch.cat(keys[-len(seen) :], 1), torch.cat(values[-len(seen) :], 1)))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    return attend
