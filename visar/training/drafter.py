"""Training an EAGLE drafter on what the target itself draws, by unrolling it on its own predictions.

Data, guidance, temperature and top-k are those of use, and the loss is the divergence of the guided laws, which is what
acceptance depends on. Unrolling is EAGLE-3's training-time test (Li et al. 2025, arXiv:2503.01840).
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visar.engine.guidance import Guidance
from visar.errors import VisarError
from visar.models.drafters import fingerprint
from visar.models.drafters.eagle import EagleHead
from visar.models.llamagen import Attend, LlamaGen
from visar.samplers.distribution import Target
from visar.training.loop import TrainConfig, distributed, fit, step_seed


class Unrolled(nn.Module):
    """An EAGLE head unrolled `depth` steps over whole sequences; the target is frozen and no part of it is saved."""

    def __init__(
        self, head: EagleHead, target: LlamaGen, guidance: Guidance, law: Target, depth: int, grid: int | None = None
    ):
        super().__init__()
        self.head = head
        self.depth, self.guidance, self.law, self.grid = depth, guidance, law, grid
        target.eval().requires_grad_(False)
        self._target = lambda: target  # no submodule: neither saved nor copied with the head

    def forward(self, condition: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        """The loss: KL(p || q) + TV(p, q) of the guided laws, later steps weighing 0.8 of those before them."""
        p, laws = self.laws(condition, mask, tokens)
        loss = p.new_zeros(())
        for step, log_q in enumerate(laws):
            own, kept = p[:, step:], log_q[:, step:]
            kl = (torch.xlogy(own, own) - own * kept).sum(-1)
            tv = (own - kept.exp()).abs().sum(-1) / 2
            loss = loss + 0.8**step * (kl + tv).mean()
        return loss

    @torch.no_grad()
    def acceptance(self, condition: Tensor, mask: Tensor, tokens: Tensor) -> list[float]:
        """The mean of 1 - TV of the laws as they are used, at each depth."""
        p, laws = self.laws(condition, mask, tokens)
        at = self._positions(tokens)
        processed = (self.law.probs(log_q * self.law.temperature, at) for log_q in laws)
        return [torch.minimum(p, q)[:, step:].sum(-1).mean().item() for step, q in enumerate(processed)]

    def laws(self, condition: Tensor, mask: Tensor, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The target law p [B, n, V] of every token, and per step the draft law in logs, before top-k and top-p.

        Row i of step k is drafted k steps behind the root: from the target's features up to slot i - k, and its own
        predictions since. Rows below k are of no root and count for nothing.
        """
        target, at = self._target(), self._positions(tokens)
        embed, prefix = target.cls_embedding, target.config.condition_length
        parts = [condition] + ([embed.null_like(condition)] if self.guidance.active else [])
        with torch.no_grad():
            x = torch.cat([embed(part) for part in parts])
            x = torch.cat([x, target.tok_embeddings(tokens[:, :-1]).repeat(len(parts), 1, 1)], dim=1)
            slots = x.shape[1]
            valid = F.pad(mask.bool(), (0, slots - prefix), value=True).repeat(len(parts), 1)
            back = torch.arange(slots, device=x.device)[:, None] - torch.arange(slots, device=x.device)
            rows = target.rotary(self.grid)[:slots].expand(len(x), -1, -1, -1)
            features = target.run(x, rows, attention([(back >= 0) & valid[:, None] | (back == 0)], [], []))
            p = self.law.probs(self._guided(target.logits(features[:, prefix - 1 :]), at), at)
        out: list[Tensor] = []
        keys: list[Tensor] = []
        values: list[Tensor] = []
        before = features
        for step in range(self.depth):
            # Of the true features, all that is `step` slots back; of each prediction since, the slot on the way here.
            seen = [(back >= step) & valid[:, None] | ((back == 0) & (step == 0))]
            seen += [(back == step - j).expand(len(x), -1, -1) for j in range(1, step + 1)]
            h = self.head(x, F.pad(before[:, :-1], (0, 0, 1, 0)), rows, attention(seen, keys, values))
            predicted = self.head.norm(h[:, prefix - 1 :]).to(target.dtype)
            logits = self._guided(target.logits(predicted), at)
            out.append((logits / self.law.temperature).log_softmax(-1))
            before = h
        return p, out

    def _positions(self, tokens: Tensor) -> Tensor:
        return torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)

    def _guided(self, logits: Tensor, at: Tensor) -> Tensor:
        if not self.guidance.active:
            return logits
        cond, uncond = logits.chunk(2)
        return self.guidance.combine(cond, uncond, at)


def attention(seen: list[Tensor], keys: list[Tensor], values: list[Tensor]) -> Attend:
    """Attention over the keys and values of all passes so far, to which it adds its own; `seen` is a mask for each."""
    mask = torch.cat(seen, -1)[:, None]

    def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys.append(k)
        values.append(v)
        q, k, v = (t.transpose(1, 2) for t in (q, torch.cat(keys[-len(seen) :], 1), torch.cat(values[-len(seen) :], 1)))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    return attend


def train_drafter(
    target: LlamaGen,
    conditions: Callable[[list[int]], tuple[Tensor, Tensor]],
    tokens: Tensor,
    config: TrainConfig,
    guidance: Guidance,
    law: Target,
    depth: int = 5,
    grid: int | None = None,
    held: float = 0.05,
) -> EagleHead:
    """Train on pictures [n, N] that the target drew, and save `eagle/` in `config.out`; returns the EMA.

    `conditions` gives the condition and the mask, each [b, ...], of rows. The last `held` of the pictures are held out;
    their acceptance per depth goes to the log.
    """
    count = max(1, int(held * len(tokens)))
    if len(tokens) <= count:
        raise VisarError(f"A drafter needs 2 or more pictures to learn from, not {len(tokens)}.")
    torch.manual_seed(config.seed)
    target.to(distributed(config.device)[2])
    c = target.config
    head = EagleHead(c.dim, c.num_heads, c.ffn, target=fingerprint(target))
    # Where the target's last block and norm take it from is a better start than nowhere.
    head.block.load_state_dict(target.layers[-1].state_dict())
    head.norm.load_state_dict(target.norm.state_dict())
    nn.init.normal_(head.fc.weight, std=head.fc.in_features**-0.5)
    nn.init.zeros_(head.fc.bias)
    model = Unrolled(head, target, guidance, law, depth, grid)
    split = len(tokens) - count

    def batch_at(step: int, rank: int) -> tuple[Tensor, ...]:
        rng = random.Random(step_seed(config.seed, step, rank))
        rows = [rng.randrange(split) for _ in range(config.batch)]
        return *conditions(rows), tokens[rows]

    def evaluate(ema: Unrolled) -> dict[str, float]:
        rows = list(range(split, len(tokens)))[:64]
        device = target.device
        found = ema.acceptance(*(t.to(device) for t in (*conditions(rows), tokens[rows])))
        return {f"acceptance_{i + 1}": round(a, 4) for i, a in enumerate(found)}

    ema = fit(model, batch_at, config, evaluate)
    if distributed()[0] == 0:
        ema.head.save_pretrained(config.out / "eagle")
    return ema.head
