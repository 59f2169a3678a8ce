"""What a list of samplers does to one model: their speed, their images, and whether these changed.

Every sampler generates the same prompts under the same seed into a folder of its own, and is compared with the first,
which is sampled once more under another seed, to show the effect of chance. The page is made by
`visar.eval.report.page`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visar.bulk import Condition, check_run, sample_images
from visar.bulk.folder import RUN
from visar.errors import VisarError
from visar.eval.benchmark.speed import SpeedReport
from visar.eval.benchmark.speed import compare as compare_speed
from visar.eval.quality.compare import Comparison, compare
from visar.eval.quality.extractors import Extractor
from visar.eval.quality.image_folder import ImageFolder
from visar.files import check_output
from visar.generation.model import ImageModel
from visar.params import SamplingParams
from visar.samplers import AnySampler

IMAGES = "images"  # the folder of the samplers' folders
PAGE = ("report.html", "report.md", "report.json", "plot.svg", "grid.webp")
OTHER_SEED = " (another seed)"

Scores = Callable[[ImageFolder, Sequence[str]], Tensor]


@dataclass(frozen=True)
class Worst:
    """A pair of images of one prompt, and how much worse that of B is."""

    id: str
    prompt: str
    drop: float


@dataclass(frozen=True)
class Entry:
    """A sampler's folder and the comparison of its images; the first sampler is compared with its own other seed."""

    label: str
    exact: bool
    folder: Path
    comparison: Comparison
    worst: tuple[Worst, ...]


@dataclass(frozen=True)
class Report:
    """`entries`: the first sampler first. `ranked_by` says what `Worst.drop` is."""

    model: str
    seed: int
    settings: dict[str, Any]
    speed: SpeedReport
    entries: tuple[Entry, ...]
    ranked_by: str

    def to_dict(self) -> dict[str, Any]:
        rows = [
            {"label": e.label, "exact": e.exact, **e.comparison.to_dict(), "worst": [asdict(w) for w in e.worst]}
            for e in self.entries
        ]
        facts = {"model": self.model, "seed": self.seed, "settings": self.settings, "ranked_by": self.ranked_by}
        return facts | {"speed": asdict(self.speed), "rows": rows}


def check_page(out: Path) -> None:
    """Raise `VisarError` where the page cannot be written into the folder `out`, or would replace what is of no report.

    A report has sampled images before it writes its page.
    """
    of_report = any(out.glob(f"{IMAGES}/*/{RUN}"))
    for file in (out / name for name in PAGE):
        if os.path.lexists(file) and not of_report:
            raise VisarError(f"{out} holds a {file.name} of something else; give another folder.")
        check_output(file)


def make_report(
    model: Any,
    samplers: Mapping[str, Any],
    conditions: Sequence[Condition | str | int],
    out: Path,
    extract: Extractor,
    *,
    name: str,
    count: int,
    batch: int = 16,
    seed: int = 0,
    reference: ImageFolder | None = None,
    clip: Scores | None = None,
    speed_images: int = 8,
    worst: int = 4,
    progress: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> Report:
    """Generate `count` images with each sampler into folders in `out`, measure speed at batch 1, and compare.

    A report that was cut short goes on: images that are there are not generated again. `tell` gets a line for each
    sampler. `settings` go to the pipeline. Raises `VisarError` for fewer than two samplers or images, and as
    `check_page`, `sample_images` and `compare` do.
    """
    model = ImageModel.of(model)
    if len(samplers) < 2:
        raise VisarError("A report compares 2 or more samplers; the first is what the others are compared with.")
    if count < 2:
        raise VisarError(f"A report compares 2 or more images of each sampler, not {count}.")
    check_page(out)
    SamplingParams(seed=seed + 1)  # the other seed must be one too, before an hour of images
    labels = list(samplers)
    how: dict[str, Any] = {"count": count, "batch": batch, "name": name, **settings}
    folders = [(label, out / IMAGES / _slug(label), seed) for label in labels]
    folders.insert(1, (labels[0], out / IMAGES / f"{_slug(labels[0])}-seed-{seed + 1}", seed + 1))
    for label, folder, at in folders:  # of all, before the first hour of images
        check_run(model, conditions, folder, sampler=samplers[label], seed=at, **how)

    def sampled(label: str, folder: Path, at: int) -> ImageFolder:
        told = sample_images(model, conditions, folder, sampler=samplers[label], seed=at, progress=progress, **how)
        tell(str(told))
        return ImageFolder.open(folder)

    first, entries = sampled(*folders[0]), list[Entry]()
    for label, folder, at in folders[1:]:
        images = sampled(label, folder, at)
        entries.append(_entry(label, samplers[label], first, images, extract, reference, clip, worst))
    for entry in entries:
        tell(f"{entry.label}{OTHER_SEED if entry is entries[0] else ''}: {entry.comparison.conclusion}")
    speed = compare_speed(model, samplers, images=speed_images, repeats=1, seed=seed, **settings)
    by = "score against its prompt" if clip else "distance of its features from those of its pair"
    return Report(name, seed, settings, speed, tuple(entries), by)


def _entry(
    label: str,
    sampler: AnySampler,
    a: ImageFolder,
    b: ImageFolder,
    extract: Extractor,
    reference: ImageFolder | None,
    clip: Scores | None,
    worst: int,
) -> Entry:
    found = compare(a, b, extract, reference=reference, clip=clip)
    if clip is not None:
        drops = clip(a, a.ids) - clip(b, a.ids)
    else:
        one, other = (torch.cat([extract(part)["pool"] for part in f.batches()]) for f in (a, b))
        drops = (one - other).norm(dim=1)
    rows = drops.topk(min(worst, len(drops))).indices.tolist()
    prompts = [a.captions.get(i) or f"class {a.records[i]['class']}" for i in a.ids]
    return Entry(label, sampler.exact, b.path, found, tuple(Worst(a.ids[i], prompts[i], float(drops[i])) for i in rows))


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9+.]+", "-", label.lower()).strip("-")
