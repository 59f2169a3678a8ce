"""Training a drafter of any kind on what the target itself draws."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from visar.engine.guidance import Guidance
from visar.errors import VisarError, unknown
from visar.files import replacing
from visar.models.drafters import KINDS, DraftHeads, EagleHead, ExitHead, SkippedLayers, TrainedDrafter, fingerprint
from visar.models.llamagen import LlamaGen
from visar.samplers.distribution import Target
from visar.training.drafting_loss import DraftLoss, EagleLoss, HeadsLoss, ShallowLoss
from visar.training.loop import TrainConfig, distributed, fit, step_seed

LOSSES: dict[str, type[DraftLoss[Any]]] = {
    "eagle": EagleLoss,
    "medusa": HeadsLoss,
    "hydra": HeadsLoss,
    "exit": ShallowLoss,
    "skip": ShallowLoss,
}
# The condition and the mask, [b, ...] each, of the pictures with these numbers
Conditions = Callable[[list[int]], tuple[Tensor, Tensor]]


def new_drafter(kind: str, target: LlamaGen, depth: int, layers: int) -> TrainedDrafter:
    """An untrained drafter for a target. Blocks start as the target's last one: a better place than nowhere."""
    c, mark = target.config, fingerprint(target)
    if kind in ("medusa", "hydra"):
        return DraftHeads(c.dim, depth, reads_tokens=kind == "hydra", target=mark)
    if kind == "skip":
        return SkippedLayers(list(range(c.num_layers)), target=mark)
    block, norm = target.layers[-1].state_dict(), target.norm.state_dict()
    made: EagleHead | ExitHead
    if kind == "exit":
        made = ExitHead(c.dim, c.num_heads, c.ffn, layers, target=mark)
    else:
        made = EagleHead(c.dim, c.num_heads, c.ffn, target=mark)
        nn.init.normal_(made.fc.weight, std=made.fc.in_features**-0.5)
        nn.init.zeros_(made.fc.bias)
    made.block.load_state_dict(block)
    made.norm.load_state_dict(norm)
    return made


def train_drafter(
    kind: str,
    target: LlamaGen,
    conditions: Conditions,
    tokens: Tensor,
    config: TrainConfig,
    guidance: Guidance,
    law: Target,
    *,
    depth: int = 5,
    layers: int = 0,
    grid: int | None = None,
    held: float = 0.05,
) -> TrainedDrafter:
    """Train on pictures [n, N] that the target drew, and save a folder named after the kind in `config.out`.

    `layers` is where an "exit" lies (default 2), or how many a "skip" keeps (default half of them). The last `held` of
    the pictures are held out; their acceptance per depth goes to the log. Returns the EMA.
    """
    if kind not in KINDS:
        raise unknown("drafter", kind, KINDS)
    layers = layers or (-(-target.config.num_layers // 2) if kind == "skip" else min(2, target.config.num_layers))
    if not 1 <= layers <= target.config.num_layers:
        raise VisarError(f"The layers must be 1 to {target.config.num_layers}, not {layers}.")
    count = max(1, int(held * len(tokens)))
    if len(tokens) <= count:
        raise VisarError(f"A drafter needs 2 or more pictures to learn from, not {len(tokens)}.")
    torch.manual_seed(config.seed)
    target.to(distributed(config.device)[2])
    drafter = new_drafter(kind, target, depth, layers)
    loss = LOSSES[kind]
    model: DraftLoss[Any] = loss(drafter, target, guidance, law, depth, grid)
    split = len(tokens) - count

    def rows_of(rows: list[int]) -> tuple[Tensor, ...]:
        return *conditions(rows), tokens[rows]

    def batch_at(step: int, rank: int) -> tuple[Tensor, ...]:
        rng = random.Random(step_seed(config.seed, step, rank))
        return rows_of([rng.randrange(split) for _ in range(config.batch)])

    def evaluate(ema: DraftLoss[Any]) -> dict[str, float]:
        rows = list(range(split, len(tokens)))[:64]
        found = ema.acceptance(*(t.to(target.device) for t in rows_of(rows)))
        return {f"acceptance_{i + 1}": round(a, 4) for i, a in enumerate(found)}

    if kind == "skip":
        drafter = fewer_layers(model, [t.to(target.device) for t in batch_at(0, 0)], layers)
        found = evaluate(loss(drafter, target, guidance, law, depth, grid))
        with replacing(config.out / "log.jsonl") as temporary:
            temporary.write_text(json.dumps({"layers": drafter.config.layers, **found}) + "\n")
        print(json.dumps({"layers": drafter.config.layers, **found}), flush=True)
    else:
        drafter = fit(model, batch_at, config, evaluate).drafter
    if distributed()[0] == 0:
        drafter.save_pretrained(config.out / kind)
    return drafter


def fewer_layers(loss: DraftLoss[Any], batch: list[Tensor], keep: int) -> SkippedLayers:
    """Leave out one layer after the other, each time the one that costs the least acceptance on a batch."""
    mark, chosen = loss.drafter.config.target, list(loss.drafter.config.layers)
    while len(chosen) > keep:
        scores: dict[int, float] = {}
        for layer in chosen:
            loss.drafter = SkippedLayers([i for i in chosen if i != layer], target=mark)
            scores[layer] = loss.acceptance(*batch)[0]
        chosen.remove(max(scores, key=lambda layer: scores[layer]))
    return SkippedLayers(chosen, target=mark)
