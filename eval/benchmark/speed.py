"""Speed as ratios in one run: each sampler on the same prompts and seeds, in turn, against our own AR loop."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from visar.errors import VisarError
from visar.eval.prompts import conditions
from visar.generation.model import ImageModel
from visar.generation.stats import MaskedStats, exactness_of, tokens_per_pass
from visar.host import synchronize


@dataclass(frozen=True)
class HeadStats:
    """Of a masked model, as in `MaskedStats`; `steps` is K where it is fixed, `denoising_steps` is T."""

    steps: int | None
    denoising_steps: int
    calls_per_pass: float
    calls_per_token: float
    evaluations_per_token: float
    acceptance: float | None


@dataclass(frozen=True)
class SpeedRow:
    """Medians over repeats. `nfe`: passes per image at this batch; ratios are against the first sampler.

    `ms_per_pass` includes drafting; the drafter's own passes take the share `draft_share` of it.
    """

    sampler: str
    exact: bool
    window: int | None  # of masked models none
    nfe: float
    tokens_per_pass: float
    ms_per_pass: float
    draft_share: float | None  # within a CUDA graph it cannot be measured
    seconds_per_image: float
    images_per_second: float
    gb_per_second: float
    nfe_ratio: float
    time_ratio: float
    head: HeadStats | None = None
    exactness: str = ""  # "exact", "relaxed", or a phrase if it is neither
    draft_passes: float | None = None  # per image, as `nfe`; of a chain at batch 1, its drafted tokens


@dataclass(frozen=True)
class SpeedReport:
    """`bandwidth` in GB/s, read and write, of a large copy on the same device in the same run."""

    device: str
    dtype: str
    torch: str
    threads: int
    batch: int
    images: int
    repeats: int
    bandwidth: float
    rows: list[SpeedRow]
    invariant: bool = False


def bandwidth(device: torch.device, megabytes: int = 256, repeats: int = 5) -> float:
    """Bytes moved per second by a copy much larger than the caches, in GB/s; the best of several."""
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * 4 / best / 1e9


def device_title(device: torch.device) -> str:
    """What a report calls the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def compare(
    model: Any,
    samplers: Mapping[str, Any],
    *,
    batch: int = 1,
    images: int = 16,
    repeats: int = 3,
    seed: int = 0,
    **settings: Any,
) -> SpeedReport:
    """Decode the same `images` images with each sampler, `repeats` times, samplers in turn, after one warm-up each.

    Times are those of decoding: the text encoder and the image decoder take the same for all and are left out.
    """
    if not samplers:
        raise VisarError("No sampler was given.")
    model = ImageModel.of(model)
    wanted = conditions(model, images)
    groups = [wanted[i : i + batch] for i in range(0, images, batch)]

    heads: dict[str, HeadStats] = {}

    def once(name: str, sampler: Any) -> dict[str, float]:
        stats = [model.generate(g, sampler=sampler, seed=seed, output_type="tokens", **settings).stats for g in groups]
        seconds, passes = sum(s.seconds for s in stats), sum(s.nfe for s in stats)
        if masked := [s for s in stats if isinstance(s, MaskedStats)]:
            heads[name] = _head_stats(masked)
        return {
            "nfe": passes / len(groups),
            "tokens_per_pass": tokens_per_pass(stats),
            "ms_per_pass": statistics.median(s.ms_per_pass for s in stats),
            "draft_share": sum(math.nan if s.draft_seconds is None else s.draft_seconds for s in stats) / seconds,
            "draft_passes": sum(math.nan if s.draft_passes is None else s.draft_passes for s in stats) / len(groups),
            "seconds_per_image": seconds / images,
            "images_per_second": images / seconds,
            "gb_per_second": sum(s.gigabytes for s in stats) / seconds,
        }

    for sampler in samplers.values():
        model.generate(groups[0], sampler=sampler, seed=seed, output_type="tokens", **settings)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in samplers}
    for _ in range(repeats):
        for name, sampler in samplers.items():
            runs[name].append(once(name, sampler))
    medians = {n: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for n, rs in runs.items()}
    base = medians[next(iter(samplers))]

    def medians_of(name: str) -> dict[str, Any]:
        found: dict[str, Any] = dict(medians[name])
        return found | {k: None for k in ("draft_share", "draft_passes") if math.isnan(found[k])}

    rows = [
        SpeedRow(
            sampler=name,
            exact=sampler.exact,
            window=None if name in heads else model.sampler_of(sampler).window,
            **medians_of(name),
            nfe_ratio=medians[name]["nfe"] / base["nfe"],
            time_ratio=medians[name]["seconds_per_image"] / base["seconds_per_image"],
            head=heads.get(name),
            exactness=exactness_of(sampler),
        )
        for name, sampler in samplers.items()
    ]
    device = model.device
    return SpeedReport(
        device_title(device), str(model.dtype).removeprefix("torch."), torch.__version__,
        torch.get_num_threads(), batch, images, repeats, bandwidth(device), rows,
        bool(settings.get("invariant")),
    )  # fmt: skip


def _head_stats(stats: list[MaskedStats]) -> HeadStats:
    """Over all batches; samplers are deterministic, so repeats do not differ."""
    whole = stats[0].joined(stats[1:])
    return HeadStats(
        whole.parameters.get("steps"),
        whole.denoising_steps,
        whole.calls_per_pass,
        whole.denoiser_calls / sum(s.tokens for s in stats),
        whole.evaluations_per_token,
        whole.acceptance,
    )
