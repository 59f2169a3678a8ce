"""A short run of training, and its log."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from visar.training.loop import TrainConfig


def config(out: Path, **changes: object) -> TrainConfig:
    plain = TrainConfig(out=out, minutes=1e9, steps=4, lr=1e-2, warmup=2, compile=False)
    return replace(plain, **changes)  # type: ignore[arg-type]


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
