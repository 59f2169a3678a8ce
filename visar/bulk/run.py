"""Bulk sampling: images by id into a folder, by any number of processes, going on after a kill."""

from __future__ import annotations

import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from visar.bulk.about import FORMAT, changed, machine, method_of, sampler_of, settings_of, weights_mark
from visar.bulk.conditions import Condition, Interleaved
from visar.bulk.folder import Journal, Line, RunFolder
from visar.bulk.ranks import Ranks
from visar.engine.rng import IMAGES
from visar.errors import NotInTraining, VisarError
from visar.files import output_folder
from visar.generation.model import ImageModel
from visar.generation.stats import DecodeStats, MaskedStats
from visar.params import DISCRETE


@dataclass(frozen=True)
class Sampled:
    """A finished run, `drawn` of whose `images` this call drew, on all ranks.

    `passes` and `seconds` are means over all images; an image's seconds are its even share of its batch's.
    """

    folder: Path
    images: int
    drawn: int
    sampler: str
    exact: bool
    passes: float
    seconds: float

    def __str__(self) -> str:
        kind = "exact" if self.exact else "relaxed"
        return (
            f"{self.sampler} ({kind}): {self.images} images in {self.folder}, {self.drawn} of them drawn now, "
            f"{self.passes:.1f} passes and {self.seconds:.2f} s per image"
        )


def sample_images(
    model: Any,
    conditions: Sequence[Condition | str | int],
    out: str | Path,
    *,
    count: int | None = None,
    sampler: Any = None,
    batch: int = 16,
    seed: int = 0,
    tokens: bool = False,
    ranks: Ranks = Ranks(),
    name: str = "",
    drafters: Sequence[str] = (),
    progress: bool = False,
    **settings: Any,
) -> Sampled:
    """Draw `count` images, by default one of each condition, into the folder `out`; a run that is there goes on.

    `conditions`: prompts, or class ids for a class model; image i has condition i % P. `batch`: images decoded at
    once. `tokens` puts each image's tokens in the manifest. `settings`: guidance_scale, guidance_interval,
    guidance_schedule, temperature, top_k and top_p, as the pipeline takes them. `name` and `drafters` are those for
    run.json. With several `ranks` all of them call this with the same arguments, on one shared folder. `progress` shows
    a bar on rank 0; bars of the pipeline's own are the caller's to disable.

    Raises `VisarError` for bad input, for a folder with another run, and where another run is at work in it.
    """
    model = ImageModel.of(model)
    order, count = _checked(model, conditions, count, batch, tokens)
    method = sampler_of(model, sampler)
    settings = settings_of(model, settings)
    folder = RunFolder(out)
    about = {
        "format": FORMAT,
        "model": name,
        "weights": weights_mark(model),
        "drafters": list(drafters),
        **method_of(method),
        "settings": settings,
        "seed": seed,
        "conditions": {"kind": order.kind, "conditions": len(order.conditions), "sha256": order.mark()},
        "count": count,
        "batch": batch,
        "tokens": tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", NotInTraining)  # there may be one for each of thousands of prompts
        ranks.agree(lambda: stack.enter_context(output_folder(folder.path)))
        ranks.agree(lambda: stack.enter_context(folder.locked(ranks.rank, ranks.world)))
        missing = set(ranks.first(lambda: _begin(folder, about, machine(model))))
        if not ranks.rank and order.kind == "class" and (extra := count % len(order.conditions)):
            warnings.warn(
                f"{count} images are no multiple of {len(order.conditions)} classes: the first {extra} get one more.",
                stacklevel=2,
            )
        batches = [range(b, min(b + batch, count)) for b in range(0, count, batch)]
        own = [ids for ids in batches if not missing.isdisjoint(ids)][ranks.rank :: ranks.world]
        bar = tqdm(
            total=count, initial=count - len(missing), unit="image", smoothing=0, file=sys.stderr,
            disable=bool(ranks.rank) or not progress,
        )  # fmt: skip
        try:
            journal = Journal(folder, ranks.rank)
            with bar:
                for ids in own:
                    _draw(model, order, ids, missing, journal, method, seed, tokens, settings)
                    bar.update(folder.drawn() - bar.n)  # those of all ranks
                ranks.agree(lambda: None)  # all have drawn their part
                bar.update(count - bar.n)
            ranks.first(lambda: folder.finish(count))
        except BaseException:
            if ranks.world == 1:  # with more, another one may be about to write
                folder.forget_if_empty()
            raise
        # Before the locks are given back: nobody changes the folder meanwhile.
        return _summary(folder, len(missing))


def _checked(
    model: ImageModel, conditions: Sequence[Condition | str | int], count: int | None, batch: int, tokens: bool
) -> tuple[Interleaved, int]:
    """The order of the images, and how many there are; `VisarError` for what the model cannot make."""
    order = Interleaved([c if isinstance(c, Condition) else Condition(c) for c in conditions])
    count = len(order.conditions) if count is None else count
    if count < 1:
        raise VisarError(f"The number of images must be 1 or more, not {count}.")
    if batch < 1:
        raise VisarError(f"The batch must be 1 or more images, not {batch}.")
    if max(order.index(i) for i in range(max(0, count - len(order.conditions)), count)) >= IMAGES:
        raise VisarError(f"There are at most {IMAGES} images of one condition.")
    family = model.family
    if tokens and family.tokens != DISCRETE:
        raise VisarError("Tokens are saved of models of discrete tokens; this one's are vectors.")
    if order.kind != family.condition:
        raise VisarError(f"This model makes images from a {family.condition}, and it was given a {order.kind}.")
    values: list[Any] = [c.value for c in order.conditions]
    family.check_conditions(values)
    if family.condition == "prompt":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again when the image is made
            family.encode(values)
    return order, count


def _begin(folder: RunFolder, about: dict[str, Any], here: Mapping[str, Any]) -> list[int]:
    """Clear the folder, say what run it is, and return the ids that are missing. Under the locks of all ranks."""
    folder.clear()
    found = folder.check(about)
    before = found["machines"] if found else []
    if difference := changed(before, here):
        warnings.warn(f"The run goes on elsewhere ({difference}): rounding may differ.", stacklevel=2)
    folder.describe(about | {"machines": before if here in before else [*before, here]})
    done = folder.done()
    return [i for i in range(about["count"]) if i not in done]


def _draw(
    model: ImageModel,
    order: Interleaved,
    ids: Sequence[int],
    wanted: set[int],
    journal: Journal,
    method: Any,
    seed: int,
    tokens: bool,
    settings: Mapping[str, Any],
) -> None:
    """One call of the pipeline; only the `wanted` ones of its images are written."""
    values = [order.condition(i).value for i in ids]
    indices = [order.index(i) for i in ids]
    out = model.generate(values, sampler=method, seed=seed, first_image=indices, **settings)
    for row, (i, image) in enumerate(zip(ids, out.images, strict=True)):
        if i in wanted:
            line = _line(order, i, row, out.stats)
            journal.write(image, line | ({"tokens": out.tokens[row].tolist()} if tokens else {}))


def _line(order: Interleaved, i: int, row: int, stats: DecodeStats) -> Line:
    """What the manifest says of image i, which was one row of a call."""
    condition = order.condition(i)
    figures: dict[str, Any] = {
        "passes": stats.passes_per_image[row],
        "batch": stats.images,
        "nfe": stats.nfe,
        "seconds": stats.seconds / stats.images,
        "draft_seconds": None if stats.draft_seconds is None else stats.draft_seconds / stats.images,
    }
    if isinstance(stats, MaskedStats):
        figures["head_rounds"] = stats.head_rounds
    line: Line = {"id": f"{i:06d}", "file": f"{i:06d}.png", order.kind: condition.value}
    if condition.id is not None:
        line["prompt_id"] = condition.id
    line |= {
        "index": order.index(i),
        "seed": stats.seed,
        "sampler": stats.sampler,
        "exact": stats.exact,
        "stats": figures,
    }
    return line | ({"metadata": dict(condition.metadata)} if condition.metadata else {})


def _summary(folder: RunFolder, drawn: int) -> Sampled:
    lines = folder.finished()
    return Sampled(
        folder=folder.path,
        images=len(lines),
        drawn=drawn,
        sampler=lines[0]["sampler"],
        exact=lines[0]["exact"],
        passes=statistics.fmean(line["stats"]["passes"] for line in lines),
        seconds=statistics.fmean(line["stats"]["seconds"] for line in lines),
    )
