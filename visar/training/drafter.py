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
from visar.drafters.acceptance import ACCEPTANCE
from visar.drafters.base import DrafterTarget
from visar.drafters.loss import DraftLoss
from visar.dtypes import STORED, checked_dtype
from visar.engine.guidance import Guidance
from visar.errors import VisarError
from visar.files import replacing, writable_folder
from visar.reading import read_json
from visar.samplers.distribution import Target
from visar.training.loop import TrainConfig, check_parts, check_same, distributed, fit, step_seed

NOTE = "drafter.json"  # in the folder of a run: what is trained there

# The condition and the mask, [b, ...] each, of the images with these numbers
Conditions = Callable[[list[int]], tuple[Tensor, Tensor]]


class Images:
    """Images that the target generated, as tokens [n, N], of which the last share `held` is held out."""

    def __init__(self, conditions: Conditions, tokens: Tensor, config: TrainConfig, held: float):
        self.conditions, self.tokens, self.config = conditions, tokens, config
        self.split = len(tokens) - max(1, int(held * len(tokens)))
        if self.split < 1:
            raise VisarError(f"Training needs 2 or more images to learn from, not {len(tokens)}.")

    def of(self, rows: list[int]) -> tuple[Tensor, ...]:
        """Condition, mask and tokens of these images."""
        return *self.conditions(rows), self.tokens[rows]

    def batch_at(self, step: int, rank: int) -> tuple[Tensor, ...]:
        """Those of a training step."""
        rng = random.Random(step_seed(self.config.seed, step, rank))
        return self.of([rng.randrange(self.split) for _ in range(self.config.batch)])

    def mean(self, found: Callable[..., list[float]], device: torch.device) -> list[float]:
        """The means of numbers that are `found` of the condition, mask and tokens of up to 64 held-out images."""
        rows = list(range(self.split, len(self.tokens)))[:64]
        total: list[float] = []
        for start in range(0, len(rows), self.config.batch):
            part = rows[start : start + self.config.batch]
            values = found(*(t.to(device) for t in self.of(part)))
            total = [a * len(part) + b for a, b in zip(values, total or [0.0] * len(values), strict=True)]
        return [a / len(rows) for a in total]


def run_of(kind: str) -> str:
    """The folder of a run, in that of its drafter."""
    return f"{kind}-run"


def check_drafter(out: Path, kind: str) -> None:
    """`check_parts` of a drafter's run. Raises `VisarError` also where a head was trained for the drafter as it is."""
    check_parts(out, f"{run_of(kind)}/{NOTE}", kind)
    if (head := out / kind / ACCEPTANCE).exists():
        raise VisarError(
            f"{head} was trained for the drafter as it is; to train the drafter further, delete its head, or give "
            "another folder."
        )


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
    checked_dtype("stored_as", stored_as, STORED)
    check_drafter(config.out, kind)
    images = Images(conditions, tokens, config, held)
    torch.manual_seed(config.seed)
    rank, _, device = distributed(config.device)
    target.model.to(device)
    drafter = drafting.new(target, depth, layers)
    run = replace(config, out=config.out / run_of(kind))
    if rank == 0:
        same_run(dict(drafter.config) | {"target": fingerprint(target.model)}, run.out)
    assert drafting.loss is not None
    loss: DraftLoss[Any] = drafting.loss(drafter, target, guidance, sampling, depth)

    def evaluate(ema: DraftLoss[Any]) -> dict[str, float]:
        found = images.mean(lambda *given: ema.acceptance(ema.run_target(*given)), device)
        return {f"acceptance_{i + 1}": round(a, 4) for i, a in enumerate(found)}

    found = drafting.search(loss, [t.to(device) for t in images.batch_at(0, 0)], layers)
    if found is None:
        drafter = fit(loss, images.batch_at, run, evaluate).drafter
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


def same_run(own: dict[str, Any], folder: Path, name: str = NOTE) -> None:
    """Note in the folder of a run what is trained there, and of what; a `VisarError` if that was something else."""
    note = writable_folder(folder) / name
    if note.exists():
        check_same(folder, json.loads(json.dumps(own)), read_json(note, dict[str, Any]))
    with replacing(note) as temporary:
        temporary.write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
