"""Train the acceptance head of a drafter (`visar.drafters.acceptance`) on images that the target generated itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visar.drafters import drafter_kind
from visar.drafters.acceptance import ACCEPTANCE, AcceptanceHead, give, width_of
from visar.drafters.base import DrafterTarget
from visar.drafters.loss import DraftLoss
from visar.engine.guidance import Guidance
from visar.samplers.distribution import Target
from visar.samplers.verification import sample
from visar.training.drafter import Conditions, Images, same_run
from visar.training.loop import TrainConfig, distributed, fit, step_seed


class AcceptanceLoss(nn.Module):
    """SpecDec++'s: the weighted cross-entropy of the predicted chance and min(1, p/q) of a draft sampled from q.

    The drafts before are the image's own tokens, of which accepted drafts have the distribution. Drafter and target
    are frozen and no part of it is saved.
    """

    def __init__(self, head: AcceptanceHead, drafting: DraftLoss[Any]):
        super().__init__()
        self.head = head
        drafting.drafter.eval().requires_grad_(False)
        self._drafting = lambda: drafting

    def forward(self, condition: Tensor, mask: Tensor, tokens: Tensor, u: Tensor) -> Tensor:
        """The loss with drafts sampled by the uniforms u [depth, B, N]."""
        weight, total = float(self.head.config.weight), tokens.new_zeros((), dtype=torch.float32)
        steps = self.drafted(condition, mask, tokens, u)
        for hidden, drafts, q, chance in steps:
            logit = self.head.logit(hidden, drafts, q)
            loss = -chance * F.logsigmoid(logit) - weight * (1 - chance) * F.logsigmoid(-logit)
            total = total + loss.mean() / len(steps)
        return total

    @torch.no_grad()
    def drafted(
        self, condition: Tensor, mask: Tensor, tokens: Tensor, u: Tensor
    ) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """At each depth hidden states [B, M, dim], drafts [B, M], their q [B, M, V], and their chances [B, M]."""
        drafting, out = self._drafting(), []
        given = drafting.run_target(condition, mask, tokens)
        for step, hidden in enumerate(drafting.steps(given)):
            q = drafting.sampling.probs(drafting.guided(drafting.logits(hidden), given.positions), given.positions)
            drafts = sample(q, u[step])
            p, own = (t.gather(-1, drafts[..., None]).squeeze(-1) for t in (given.target_probs, q))
            parts = hidden[: len(tokens)], drafts, q, (p / own).clamp_max(1)
            out.append(tuple(part[:, step:] for part in parts))  # those before have no root
        return out  # type: ignore[return-value]

    @torch.no_grad()
    def explained(self, condition: Tensor, mask: Tensor, tokens: Tensor, u: Tensor) -> list[float]:
        """Nats per draft of the predicted chances and of their mean for all drafts; and that mean."""
        found = [(self.head(h, d, q), chance) for h, d, q, chance in self.drafted(condition, mask, tokens, u)]
        predicted, chance = (torch.cat([part[i].flatten() for part in found]).double() for i in range(2))
        mean = chance.mean()
        nats = [-(chance * x.log() + (1 - chance) * (1 - x).log()).mean().item() for x in (predicted, mean)]
        return [*nats, mean.item()]


def train_acceptance(
    kind: str,
    drafter: Any,
    target: DrafterTarget,
    conditions: Conditions,
    tokens: Tensor,
    config: TrainConfig,
    guidance: Guidance,
    sampling: Target,
    *,
    depth: int = 5,
    held: float = 0.05,
    stored_as: torch.dtype = torch.float32,
) -> AcceptanceHead:
    """Train the head of a drafter on images [n, N] that the target generated, and save it with it in `config.out`.

    The last `held` of the images are held out: the log has the nats per draft of the head (`nats`) and of one chance
    for all (`nats_of_mean`, at `acceptance`). Returns the EMA. Raises `VisarError` for fewer than two images.
    """
    images = Images(conditions, tokens, config, held)
    torch.manual_seed(config.seed)
    rank, _, device = distributed(config.device)
    target.model.to(device)
    drafter.to(device)
    loss_of = drafter_kind(kind).loss
    assert loss_of is not None
    head = AcceptanceHead(width_of(drafter, target))
    run = replace(config, out=config.out / f"{kind}-{ACCEPTANCE}-run")
    if rank == 0:
        same_run(head, target.model, run.out)
    depth = drafter.config.get("depth", depth)
    loss = AcceptanceLoss(head, loss_of(drafter, target, guidance, sampling, depth))

    def uniforms(seed: int, batch: int) -> Tensor:
        shape = (depth, batch, tokens.shape[1])
        return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def batch_at(step: int, rank: int) -> tuple[Tensor, ...]:
        return *images.batch_at(step, rank), uniforms(step_seed(config.seed, step, rank), config.batch)

    def evaluate(ema: AcceptanceLoss) -> dict[str, float]:
        found = images.mean(lambda c, m, t: ema.explained(c, m, t, uniforms(0, len(t)).to(device)), device)
        return dict(zip(("nats", "nats_of_mean", "acceptance"), (round(x, 4) for x in found), strict=True))

    head = fit(loss, batch_at, run, evaluate).head
    give(drafter, head)
    if rank == 0:
        folder = config.out / kind
        if not (folder / "config.json").exists():
            drafter.save_pretrained(folder, stored_as)
        head.save_pretrained(folder / ACCEPTANCE, stored_as)
    return head
