"""The images that one process of a bulk run makes, with their lines in the manifest: row by row, or in batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from PIL import Image

from visar.bulk.conditions import Interleaved
from visar.bulk.folder import Line
from visar.bulk.ranks import Ranks
from visar.engine.session import RowsAreFixed
from visar.generation.model import ImageModel, undisturbed
from visar.generation.pool import Finished, Pool, Request, fits_pool
from visar.generation.progress import to_pil
from visar.generation.stats import DecodeStats, MaskedStats
from visar.params import SamplingParams

Made = Iterator[tuple[Image.Image, Line]]


@dataclass(frozen=True)
class Work:
    """A run: which of its `count` images are `done`, and how the others are made."""

    model: ImageModel
    order: Interleaved
    count: int
    done: set[int]
    batch: int
    method: Any
    seed: int
    tokens: bool
    settings: Mapping[str, Any]
    ranks: Ranks

    def line(self, i: int, metrics: dict[str, Any], tokens: torch.Tensor) -> Line:
        """The manifest's line of image i."""
        condition = self.order.condition(i)
        line: Line = {"id": f"{i:06d}", "file": f"{i:06d}.png", self.order.kind: condition.value}
        if condition.id is not None:
            line["prompt_id"] = condition.id
        line |= {
            "index": self.order.index(i),
            "seed": self.seed,
            "sampler": self.method.name,
            "exact": self.method.exact,
            "stats": metrics,
        }
        if condition.metadata:
            line["metadata"] = dict(condition.metadata)
        return line | ({"tokens": tokens.tolist()} if self.tokens else {})


def made(work: Work) -> Made:
    """All that are missing for this rank: in rows, or where those cannot be replaced one by one, in batches."""
    if fits_pool(work.model, work.method):
        try:
            yield from rows(work)
            return
        except RowsAreFixed:  # raised for the first image
            pass
    yield from batches(work)


def rows(work: Work) -> Made:
    """In a pool of `batch` rows, of which each takes the next image as soon as it has finished one."""
    family = work.model.family
    missing = (i for i in range(work.count) if i not in work.done)
    own = islice(missing, work.ranks.rank, None, work.ranks.world)
    params = SamplingParams(seed=work.seed, **{n: v for n, v in work.settings.items() if v is not None})
    pool = Pool(
        work.model, work.method, size=work.batch, guided=params.guidance_scale != 1, invariant=bool(params.invariant)
    )
    for done in pool.run(Request(work.order.condition(i).value, params, work.order.index(i), i) for i in own):
        with torch.no_grad(), undisturbed(family.device):
            (image,) = to_pil(family.decode(done.tokens[None]))
        yield image, work.line(done.request.tag, _metrics_of_row(done, work.batch), done.tokens)


def batches(work: Work) -> Made:
    """In batches of ids, whole ones: of a model whose rows go in lockstep, rounding may depend on them."""
    every = (range(b, min(b + work.batch, work.count)) for b in range(0, work.count, work.batch))
    missing = (ids for ids in every if not work.done.issuperset(ids))
    for ids in islice(missing, work.ranks.rank, None, work.ranks.world):
        values = [work.order.condition(i).value for i in ids]
        indices = [work.order.index(i) for i in ids]
        out = work.model.generate(values, sampler=work.method, seed=work.seed, first_image=indices, **work.settings)
        for row, (i, image) in enumerate(zip(ids, out.images, strict=True)):
            if i not in work.done:
                yield image, work.line(i, _metrics_of(row, out.stats), out.tokens[row])


def _metrics_of_row(done: Finished, size: int) -> dict[str, Any]:
    return {
        "passes": done.passes,
        "batch": size,
        "nfe": done.nfe,
        "seconds": done.seconds,
        "draft_seconds": done.draft_seconds,
    }


def _metrics_of(row: int, stats: DecodeStats) -> dict[str, Any]:
    metrics = {
        "passes": stats.passes_per_image[row],
        "batch": stats.images,
        "nfe": stats.nfe,
        "seconds": stats.seconds / stats.images,
        "draft_seconds": None if stats.draft_seconds is None else stats.draft_seconds / stats.images,
    }
    return metrics | ({"denoiser_calls": stats.denoiser_calls} if isinstance(stats, MaskedStats) else {})
