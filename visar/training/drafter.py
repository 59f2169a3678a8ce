"""Train a drafter of any kind on images that the target generated itself."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visar.drafters import drafter_kind, fingerprint
from visar.drafters.base import DrafterTarget
from visar.drafters.loss import DraftLoss
from visar.engine.decoder import Decoder
from visar.engine.guidance import Guidance
from visar.errors import VisarError
from visar.files import replacing, writable_folder
from visar.reading import read_json
from visar.samplers.distribution import Target
from visar.training.loop import TrainConfig, distributed, fit, step_seed

# The condition and the mask, [b, ...] each, of the images with these numbers
Conditions = Callable[[list[int]], tuple[Tensor, Tensor]]


def train_drafter(
    kind: str,
    target: DrafterTarget,
    conditions: Conditions,
    tokens: Tensor,
    config: TrainConfig,
    guidance: Guidance,
    sampling: Target,
    *,
    depth: int = 5,
    layers: int | None = None,
    held: float = 0.05,
    stored_as: torch.dtype = torch.float32,
) -> Any:
    """Train on images [n, N] that the target generated, and save a folder named after the kind in `config.out`.

    `depth` is that of the kinds that `layers` is not for (see `DraftKind.checked_layers`). The last `held` of the
    images are held out; their acceptance rate per depth goes to the log, in "KIND-run" with the state of the run.
    Returns the EMA, of which `stored_as` is the dtype in the folder; in 8 bits the acceptance rate hardly changes.
    Raises `VisarError` for an unknown kind, layers that cannot be, and fewer than two images.
    """
    drafting = drafter_kind(kind)
    drafting.check_target(target)
    layers = drafting.checked_layers(layers, target.model.config.num_layers)
    count = max(1, int(held * len(tokens)))
    if len(tokens) <= count:
        raise VisarError(f"A drafter needs 2 or more images to learn from, not {len(tokens)}.")
    torch.manual_seed(config.seed)
    rank, _, device = distributed(config.device)
    target.model.to(device)
    drafter = drafting.new(target, depth, layers)
    run = replace(config, out=config.out / f"{kind}-run")
    if rank == 0:
        same_run(drafter, target.model, run.out)
    assert drafting.loss is not None
    loss: DraftLoss[Any] = drafting.loss(drafter, target, guidance, sampling, depth)
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
            found = ema.acceptance(ema.run_target(*(t.to(device) for t in rows_of(part))))
            total = [a * len(part) + b for a, b in zip(found, total or [0.0] * len(found), strict=True)]
        return {f"acceptance_{i + 1}": round(a / len(rows), 4) for i, a in enumerate(total)}

    found = drafting.search(loss, [t.to(device) for t in batch_at(0, 0)], layers)
    if found is None:
        drafter = fit(loss, batch_at, run, evaluate).drafter
    else:
        loss.drafter = drafter = found
        row = json.dumps({"layers": drafter.config.layers, **evaluate(loss)})
        if rank == 0:
            with replacing(run.out / "log.jsonl") as temporary:
                temporary.write_text(row + "\n", encoding="utf-8")
            print(row, flush=True)
    if rank == 0:
        drafter.save_pretrained(config.out / kind, stored_as)
    return drafter


def same_run(drafter: Any, target: Decoder, folder: Path) -> None:
    """Note in the folder of a run what is trained there; a `VisarError` if that is another drafter."""
    own = dict(drafter.config) | {"target": fingerprint(target)}
    note = writable_folder(folder) / "drafter.json"
    if note.exists() and read_json(note, dict[str, Any]) != json.loads(json.dumps(own)):
        raise VisarError(f"{folder} is a run with other settings or of another target; give another folder.")
    with replacing(note) as temporary:
        temporary.write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
