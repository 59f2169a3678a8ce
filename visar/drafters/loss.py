"""What drafters learn from: how far their guided distributions are from the target's, after one step and several.

Guidance, temperature and the images are those of use, and the loss is the divergence of the guided distributions, which
is what the acceptance rate depends on.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visar.drafters.base import DrafterTarget
from visar.engine.decoder import Attend
from visar.engine.guidance import Guidance
from visar.families.llamagen.rotary import turned
from visar.samplers.distribution import Target


class TargetPass(NamedTuple):
    """The target over whole sequences of S slots, the conditional rows first.

    `given`: condition, mask and tokens; `x` [rows, S, dim] embeddings; `hidden` [rows, S, dim * (1 + aux_layers)];
    `table`, their rotary rows; `valid` [rows, S], which are no padding; `distance` [S, S], how many slots j comes
    before i; `positions` [B, N] of the tokens; `target_probs` [B, N, V].
    """

    given: tuple[Tensor, Tensor, Tensor]
    x: Tensor
    hidden: Tensor
    table: Tensor
    valid: Tensor
    distance: Tensor
    positions: Tensor
    target_probs: Tensor

    @property
    def prefix(self) -> int:
        """The condition slots before the first token."""
        return self.x.shape[1] - self.given[2].shape[1] + 1

    def causal(self) -> Tensor:
        """The attention mask [rows, S, S]; padding attends to itself."""
        return (self.distance >= 0) & self.valid[:, None] | (self.distance == 0)


D = TypeVar("D", bound=nn.Module)


class DraftLoss(nn.Module, Generic[D]):
    """A drafter over whole sequences, `depth` tokens deep; the target is frozen and no part of it is saved."""

    def __init__(self, drafter: D, target: DrafterTarget, guidance: Guidance, sampling: Target, depth: int):
        super().__init__()
        self.drafter = drafter
        self.depth, self.guidance, self.sampling = depth, guidance, sampling
        self.aux_layers = tuple(getattr(drafter.config, "aux_layers", ()))
        target.model.eval().requires_grad_(False)
        self._target = lambda: target  # no submodule: neither saved nor copied with the drafter

    @abstractmethod
    def steps(self, target_pass: TargetPass) -> list[Tensor]:
        """What the output head reads, [rows, N, dim], for the tokens drafted first, second, ... after the root.

        Row i of step k is drafted k steps after its root: from the target's hidden states before it, and what was
        drafted since. Rows below k have no root and count for nothing.
        """

    def forward(self, condition: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        """The loss: KL(p || q) + TV(p, q) of the guided distributions, each step weighing 0.8 of the one before."""
        target_pass = self.run_target(condition, mask, tokens)
        loss = target_pass.target_probs.new_zeros(())
        for step, log_probs in enumerate(self.log_draft_probs(target_pass)):
            p, log_q = target_pass.target_probs[:, step:], log_probs[:, step:]
            kl = (torch.xlogy(p, p) - p * log_q).sum(-1)
            tv = (p - log_q.exp()).abs().sum(-1) / 2
            loss = loss + 0.8**step * (kl + tv).mean()
        return loss

    @torch.no_grad()
    def acceptance(self, target_pass: TargetPass) -> list[float]:
        """The acceptance rate at each depth: the mean of 1 - TV of the distributions as samplers use them."""
        logs = self.log_draft_probs(target_pass)
        draft_probs = (self.sampling.probs(log_q * self.sampling.temperature, target_pass.positions) for log_q in logs)
        return [
            torch.minimum(target_pass.target_probs, q)[:, n:].sum(-1).mean().item() for n, q in enumerate(draft_probs)
        ]

    def log_draft_probs(self, target_pass: TargetPass) -> Iterator[Tensor]:
        """Per step the draft distribution [B, N, V] of every token, in logs, before top-k and top-p."""
        for hidden in self.steps(target_pass):
            logits = self.guided(self.logits(hidden), target_pass.positions)
            yield (logits / self.sampling.temperature).log_softmax(-1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, N, V], fp32, of what the output head reads; by default the head is the target's."""
        target = self._target().model
        return target.logits(hidden.to(target.dtype))

    @torch.no_grad()
    def run_target(self, condition: Tensor, mask: Tensor, tokens: Tensor) -> TargetPass:
        """The target over tokens [B, N] under their conditions, whose mask is [B, T], or of each batch [B, n, T]."""
        target = self._target()
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        x = target.embedded(target.model, condition, tokens, self.guidance.active)
        slot = torch.arange(x.shape[1], device=x.device)
        batches, prefix = len(x) // len(tokens), x.shape[1] - tokens.shape[1] + 1
        rows = mask.bool() if mask.ndim == 3 else mask.bool()[:, None].expand(-1, batches, -1)
        valid = F.pad(rows[:, :batches].transpose(0, 1).flatten(0, 1), (0, len(slot) - prefix), value=True)
        table, none = self._table(target.model, x, prefix), x.new_zeros(())
        given, distance = (condition, mask, tokens), slot[:, None] - slot
        target_pass = TargetPass(given, x, none, table, valid, distance, positions, none)
        hidden = target.model.run(x, table, attention([target_pass.causal()], [], []), self.aux_layers)
        if mask.ndim == 3:  # prompts begin where their padding ends, and nothing is before them
            hidden = hidden * valid[..., None]
        logits = self.guided(target.model.logits(hidden[:, prefix - 1 :]), positions)
        return target_pass._replace(hidden=hidden, target_probs=self.sampling.probs(logits, positions))

    def _table(self, model: nn.Module, x: Tensor, prefix: int) -> Tensor:
        """The rotary rows of inputs x [rows, S, dim] of a model, of which `prefix` are the condition's."""
        return self._target().table(model, prefix)[: x.shape[1]].expand(len(x), -1, -1, -1)

    def guided(self, logits: Tensor, positions: Tensor) -> Tensor:
        if not self.guidance.active:
            return logits
        cond, uncond = logits.chunk(2)
        return self.guidance.combine(cond, uncond, positions)


def later(x: Tensor, slots: int) -> Tensor:
    """x [rows, S, dim] moved `slots` back in time, zeros before it."""
    return F.pad(x, (0, 0, slots, 0))[:, : x.shape[1]]


def attention(masks: list[Tensor], keys: list[Tensor], values: list[Tensor]) -> Attend:
    """Attention over the keys and values of all passes so far, to which it adds its own; there is a mask for each."""
    mask = torch.cat(masks, -1)[:, None]

    def attend(_: int, qkv: Tensor, table: Tensor) -> Tensor:
        q, k, v = turned(qkv, table)
        keys.append(k)
        values.append(v)
        passes = slice(-len(masks), None)
        q, k, v = (t.transpose(1, 2) for t in (q, torch.cat(keys[passes], 1), torch.cat(values[passes], 1)))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    return attend
