"""Train the acceptance head of a drafter (`visar.drafters.acceptance`) on images that the target generated itself.

Target and drafter stay as they are, so they run over the images once, and the head learns from what they gave.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visar.drafters import drafter_kind, fingerprint
from visar.drafters.acceptance import ACCEPTANCE, AcceptanceHead, drafter_mark, give, statistics, width_of
from visar.drafters.base import DrafterTarget
from visar.drafters.loss import DraftLoss
from visar.dtypes import STORED, checked_dtype
from visar.engine.guidance import Guidance
from visar.samplers.distribution import Target
from visar.samplers.verification import sample
from visar.training.drafter import Conditions, Images, same_run
from visar.training.loop import TrainConfig, distributed, fit, step_seed

MOST = 2**18  # drafts that it learns from, which fit into memory


def acceptance_run_of(kind: str) -> str:
    """The folder of a run, in that of its drafter."""
    return f"{kind}-{ACCEPTANCE}-run"


class Tested(NamedTuple):
    """Drafts: the hidden states [n, dim] and `statistics` [n, 3] that the head reads, and min(1, p/q) [n]."""

    hidden: Tensor
    numbers: Tensor
    chance: Tensor


@torch.no_grad()
def tested(drafting: DraftLoss[Any], condition: Tensor, mask: Tensor, tokens: Tensor, seed: int) -> Tested:
    """A draft of every token of the images, at every depth.

    The drafts before it are the image's own tokens: those have the distribution of accepted drafts.
    """
    given, parts = drafting.run_target(condition, mask, tokens), []
    generator = torch.Generator().manual_seed(seed)
    for step, hidden in enumerate(drafting.steps(given)):
        q = drafting.sampling.probs(drafting.guided(drafting.logits(hidden), given.positions), given.positions)
        drafts = sample(q, torch.rand(tokens.shape, dtype=torch.float64, generator=generator).to(q.device))
        p, own = (t.gather(-1, drafts[..., None]).squeeze(-1) for t in (given.target_probs, q))
        found = hidden[: len(tokens)].float(), statistics(drafts, q), (p / own).clamp_max(1)
        parts.append([t[:, step:].flatten(0, 1) for t in found])  # those before have no root
    return Tested(*(torch.cat(part) for part in zip(*parts, strict=True)))


class AcceptanceLoss(nn.Module):
    """The cross-entropy of SpecDec++, in which rejections have the head's `weight`."""

    def __init__(self, head: AcceptanceHead):
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor, numbers: Tensor, chance: Tensor) -> Tensor:
        logit = self.head.logit(hidden, numbers)
        loss = chance * F.logsigmoid(logit) + self.head.config.weight * (1 - chance) * F.logsigmoid(-logit)
        return -loss.mean()


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

    A step has as many drafts as `config.batch` images have tokens. The last `held` of the images are held out: the log
    has the nats per draft of the head (`nats`) and of one chance for all (`nats_of_mean`, at `acceptance`). Returns the
    EMA. Raises `VisarError` for fewer than two images.
    """
    checked_dtype("stored_as", stored_as, STORED)
    torch.manual_seed(config.seed)
    rank, _, device = distributed(config.device)
    target.model.to(device)
    drafter.to(device).eval()
    head = AcceptanceHead(width_of(drafter, target), drafter=drafter_mark(drafter))
    run = replace(config, out=config.out / acceptance_run_of(kind))
    if rank == 0:
        same_run(dict(head.config) | {"target": fingerprint(target.model)}, run.out)
    loss_of = drafter_kind(kind).loss
    assert loss_of is not None
    drafting = loss_of(drafter, target, guidance, sampling, drafter.config.get("depth", depth))
    images = Images(conditions, tokens[: max(2, MOST // (tokens.shape[1] * drafting.depth))], config, held)

    def found(first: int, end: int) -> Tested:
        parts = []
        for start in range(first, end, config.batch):
            given = images.of(list(range(start, min(start + config.batch, end))))
            condition, mask, own = (t.to(device) for t in given)
            parts.append(tested(drafting, condition, mask, own, step_seed(config.seed, start, 0)))
        return Tested(*(torch.cat(part) for part in zip(*parts, strict=True)))

    learnt, unseen = found(0, images.split), found(images.split, len(images.tokens))

    def batch_at(step: int, rank: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(step_seed(config.seed, step, rank))
        rows = torch.randint(len(learnt.chance), (config.batch * tokens.shape[1],), generator=generator).to(device)
        return tuple(t[rows] for t in learnt)

    def evaluate(ema: AcceptanceLoss) -> dict[str, float]:
        chance = unseen.chance.double()
        guesses = {"nats": ema.head.chance(unseen.hidden, unseen.numbers).double(), "nats_of_mean": chance.mean()}
        nats = {k: -(chance * g.log() + (1 - chance) * (1 - g).log()).mean().item() for k, g in guesses.items()}
        return {name: round(value, 4) for name, value in {**nats, "acceptance": chance.mean().item()}.items()}

    head = fit(AcceptanceLoss(head), batch_at, run, evaluate).head
    give(drafter, head)
    if rank == 0:
        folder = config.out / kind
        if not (folder / "config.json").exists():
            drafter.save_pretrained(folder, stored_as)
        head.save_pretrained(folder / ACCEPTANCE, stored_as)
    return head
