"""The images of a bulk run, with their lines in the manifest: row by row, or in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
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
    in_rows: bool = False  # whether an image that is done leaves its row to the next

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


def units(work: Work) -> list[list[int]]:
    """The ids that are missing, together where they are decoded together: as rounding may depend on a batch, all ids of
    one that is not complete."""
    if work.in_rows:
        return [[i] for i in range(work.count) if i not in work.done]
    every = (range(b, min(b + work.batch, work.count)) for b in range(0, work.count, work.batch))
    return [list(ids) for ids in every if not work.done.issuperset(ids)]


def own_share(work: Work) -> Made:
    """The images that this rank makes."""
    return made(work, islice(units(work), work.ranks.rank, None, work.ranks.world))


def made(work: Work, every: Iterable[list[int]]) -> Made:
    """The images of `units`, which may be a stream: the next is taken when there is room for it."""
    return rows(work, (i for ids in every for i in ids)) if work.in_rows else batches(work, every)


def in_rows(model: ImageModel, method: Any, condition: Any, settings: Mapping[str, Any]) -> bool:
    """Whether a model's images can come and go one by one: not in lockstep, nor where its sessions cannot do so."""
    if not fits_pool(model, method):
        return False
    try:
        _pool(model, method, settings, 1).admit(Request(condition, _params(settings)))
    except RowsAreFixed:
        return False
    return True


def rows(work: Work, ids: Iterable[int]) -> Made:
    """In a pool of `batch` rows, of which each takes the next image as soon as it has finished one."""
    family, params = work.model.family, replace(_params(work.settings), seed=work.seed)
    pool = _pool(work.model, work.method, work.settings, work.batch)
    for done in pool.run(Request(work.order.condition(i).value, params, work.order.index(i), i) for i in ids):
        with torch.no_grad(), undisturbed(family.device):
            (image,) = to_pil(family.decode_for([done.request.condition], done.tokens[None]))
        yield image, work.line(done.request.tag, _metrics_of_row(done, work.batch), done.tokens)


def batches(work: Work, every: Iterable[list[int]]) -> Made:
    """Whole batches of ids."""
    for ids in every:
        values = [work.order.condition(i).value for i in ids]
        indices = [work.order.index(i) for i in ids]
        out = work.model.generate(values, sampler=work.method, seed=work.seed, first_image=indices, **work.settings)
        for row, (i, image) in enumerate(zip(ids, out.images, strict=True)):
            if i not in work.done:
                yield image, work.line(i, _metrics_of(row, out.stats), out.tokens[row])


def _params(settings: Mapping[str, Any]) -> SamplingParams:
    return SamplingParams(**{n: v for n, v in settings.items() if v is not None})


def _pool(model: ImageModel, method: Any, settings: Mapping[str, Any], size: int) -> Pool:
    params = _params(settings)
    return Pool(model, method, size=size, guided=params.guidance_scale != 1, invariant=bool(params.invariant))


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
