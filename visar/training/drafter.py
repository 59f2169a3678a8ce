"""Training a drafter of any kind on what the target itself draws."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visar.drafters import (
    KINDS,
    DraftHeads,
    DraftModel,
    EagleHead,
    ExitHead,
    SkippedLayers,
    fingerprint,
)
from visar.drafters.losses import DraftLoss, EagleLoss, HeadsLoss, ModelLoss, ShallowLoss
from visar.engine.guidance import Guidance
from visar.errors import VisarError, unknown
from visar.families.llamagen.gpt import CaptionEmbedding, LlamaGen
from visar.families.weights import quiet_conversion
from visar.files import replacing, writable_folder
from visar.samplers.distribution import Target
from visar.training.ar import initialise
from visar.training.loop import TrainConfig, distributed, fit, step_seed

LOSSES: dict[str, type[DraftLoss[Any]]] = {
    "eagle": EagleLoss,
    "medusa": HeadsLoss,
    "hydra": HeadsLoss,
    "exit": ShallowLoss,
    "skip": ShallowLoss,
    "model": ModelLoss,
}
# The condition and the mask, [b, ...] each, of the images with these numbers
Conditions = Callable[[list[int]], tuple[Tensor, Tensor]]


def checked_layers(kind: str, layers: int | None, of: int) -> int:
    """The layers before an "exit" (default: 2), or in a "skip" (half) or "model" (a third), of a target that has `of`.

    0 for other kinds, which have none. Raises `VisarError` for a kind that is none, and layers that cannot be.
    """
    if kind not in KINDS:
        raise unknown("drafter", kind, KINDS)
    if kind not in ("exit", "skip", "model"):
        if layers is not None:
            raise VisarError(f"A drafter of the kind {kind!r} has no layers to choose; exit, skip and model have.")
        return 0
    if layers is None:
        return {"exit": min(2, of), "skip": -(-of // 2), "model": -(-of // 3)}[kind]
    if not 1 <= layers <= of:
        raise VisarError(f"The layers must be 1 to {of}, not {layers}.")
    return layers


def default_aux_layers(layers: int) -> tuple[int, ...]:
    """A low and a middle layer of a target, beside whose last feature an EAGLE drafter reads their outputs."""
    return tuple(sorted({layers // 4, layers // 2} - {layers - 1}))


def new_drafter(kind: str, target: LlamaGen, depth: int, layers: int, grid: int | None = None) -> DraftModel:
    """An untrained drafter for a target. Blocks start as the target's last one: a better place than nowhere."""
    c, mark = target.config, fingerprint(target)
    if kind == "model":
        return smaller_model(target, layers, grid or c.grid)
    if kind in ("medusa", "hydra"):
        return DraftHeads(c.dim, depth, reads_tokens=kind == "hydra", target=mark)
    if kind == "skip":
        return SkippedLayers(list(range(c.num_layers)), target=mark)
    block, norm = target.layers[-1].state_dict(), target.norm.state_dict()
    made: EagleHead | ExitHead
    if kind == "exit":
        made = ExitHead(c.dim, c.num_heads, c.ffn, layers, target=mark)
    else:
        made = EagleHead(c.dim, c.num_heads, c.ffn, aux_layers=default_aux_layers(c.num_layers), target=mark)
        nn.init.normal_(made.fc.weight, std=made.fc.in_features**-0.5)
        nn.init.zeros_(made.fc.bias)
        if made.fusion is not None:
            nn.init.eye_(made.fusion.weight)  # at first the last feature alone
    made.block.load_state_dict(block)
    made.norm.load_state_dict(norm)
    return made


def smaller_model(target: LlamaGen, layers: int, grid: int) -> LlamaGen:
    """A LlamaGen of the same inputs and codes, half as wide."""
    own = {k: v for k, v in target.config.items() if not k.startswith("_")} | {"grid": grid}
    heads = target.config.num_heads // 2 or 1
    dim = heads * target.head_dim
    made = initialise(LlamaGen(**own | dict(num_layers=layers, num_heads=heads, dim=dim, ffn=2 * dim)))
    own_condition, its = made.cls_embedding, target.cls_embedding
    if isinstance(own_condition, CaptionEmbedding) and isinstance(its, CaptionEmbedding):
        own_condition.uncond_embedding.copy_(its.uncond_embedding)  # what no caption looks like is not learnt
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
    layers: int | None = None,
    grid: int | None = None,
    held: float = 0.05,
    stored_as: torch.dtype = torch.float32,
) -> DraftModel:
    """Train on images [n, N] that the target drew, and save a folder named after the kind in `config.out`.

    `depth` is that of the kinds that `layers` is not for (see `checked_layers`). The last `held` of the images are
    held out; their acceptance per depth goes to the log, which lies with the state of the run in "KIND-run". Returns
    the EMA, of which `stored_as` is the dtype in the folder; in 8 bits acceptance hardly notices.
    """
    layers = checked_layers(kind, layers, target.config.num_layers)
    count = max(1, int(held * len(tokens)))
    if len(tokens) <= count:
        raise VisarError(f"A drafter needs 2 or more images to learn from, not {len(tokens)}.")
    torch.manual_seed(config.seed)
    rank, _, device = distributed(config.device)
    target.to(device)
    drafter = new_drafter(kind, target, depth, layers, grid)
    run = replace(config, out=config.out / f"{kind}-run")
    if rank == 0:
        same_run(drafter, target, run.out)
    loss: DraftLoss[Any] = LOSSES[kind](drafter, target, guidance, law, depth, grid)
    split = len(tokens) - count

    def rows_of(rows: list[int]) -> tuple[Tensor, ...]:
        return *conditions(rows), tokens[rows]

    def batch_at(step: int, rank: int) -> tuple[Tensor, ...]:
        rng = random.Random(step_seed(config.seed, step, rank))
        return rows_of([rng.randrange(split) for _ in range(config.batch)])

    def evaluate(ema: DraftLoss[Any]) -> dict[str, float]:
        rows = list(range(split, len(tokens)))[:64]
        total: list[float] = []
        for start in range(0, len(rows), config.batch):
            part = rows[start : start + config.batch]
            found = ema.acceptance(ema.look(*(t.to(device) for t in rows_of(part))))
            total = [a * len(part) + b for a, b in zip(found, total or [0.0] * len(found), strict=True)]
        return {f"acceptance_{i + 1}": round(a / len(rows), 4) for i, a in enumerate(total)}

    if kind == "skip":
        if rank == 0:
            loss.drafter = drafter = fewer_layers(loss, [t.to(device) for t in batch_at(0, 0)], layers)
            row = json.dumps({"layers": drafter.config.layers, **evaluate(loss)})
            with replacing(run.out / "log.jsonl") as temporary:
                temporary.write_text(row + "\n")
            print(row, flush=True)
    else:
        drafter = fit(loss, batch_at, run, evaluate).drafter
    if rank == 0:
        with quiet_conversion():
            stored = copy.deepcopy(drafter).to(stored_as)
        stored.save_pretrained(config.out / kind)
    return drafter


def same_run(drafter: DraftModel, target: LlamaGen, folder: Path) -> None:
    """Note in the folder of a run what is trained there; a `VisarError` if that is another drafter."""
    own = {k: v for k, v in drafter.config.items() if not k.startswith("_")} | {"target": fingerprint(target)}
    note = writable_folder(folder) / "drafter.json"
    if note.exists() and json.loads(note.read_text()) != json.loads(json.dumps(own)):
        raise VisarError(f"{folder} is a run with other settings or of another target; give another folder.")
    with replacing(note) as temporary:
        temporary.write_text(json.dumps(own, indent=2) + "\n")


def fewer_layers(loss: DraftLoss[Any], batch: list[Tensor], keep: int) -> SkippedLayers:
    """Leave out one layer after the other, each time the one that costs the least acceptance on a batch."""
    mark, chosen, seen = loss.drafter.config.target, list(loss.drafter.config.layers), loss.look(*batch)
    while len(chosen) > keep:
        scores: dict[int, float] = {}
        for layer in chosen:
            loss.drafter = SkippedLayers([i for i in chosen if i != layer], target=mark)
            scores[layer] = loss.acceptance(seen)[0]
        chosen.remove(max(scores, key=lambda layer: scores[layer]))
    return SkippedLayers(chosen, target=mark)
