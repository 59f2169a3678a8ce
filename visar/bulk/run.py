"""Bulk sampling: images by id into a folder, with any number of processes; a killed run can continue."""

from __future__ import annotations

import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from visar.bulk.about import FORMAT, changed, machine, method_of, sampler_of, settings_of, weights_mark
from visar.bulk.conditions import Condition, Interleaved, conditions_of
from visar.bulk.folder import Journal, RunFolder
from visar.bulk.ranks import Ranks
from visar.bulk.work import Made, Work, in_rows, own_share
from visar.engine.rng import IMAGES
from visar.errors import NotInTraining, VisarError
from visar.files import output_folder
from visar.generation.model import ImageModel
from visar.generation.stats import exactness_of
from visar.params import DISCRETE, SamplingParams, truth, whole


@dataclass(frozen=True)
class Sampled:
    """A finished run; this call sampled `sampled` of its `images`, on all ranks.

    `passes` and `seconds` are means over all images; an image's seconds are its share of the passes that it was in.
    """

    folder: Path
    images: int
    sampled: int
    sampler: str
    exact: bool
    passes: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.sampler} ({exactness_of(self)}): {self.images} images in {self.folder}, {self.sampled} of them "
            f"sampled now, {self.passes:.1f} passes and {self.seconds:.2f} s per image"
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
    crew: Callable[[Work], Made] = own_share,
    name: str = "",
    drafters: Sequence[str] = (),
    progress: bool = False,
    **settings: Any,
) -> Sampled:
    """Sample `count` images, by default one of each condition, into the folder `out`; continues a run in it.

    `conditions`: prompts, or class ids for a class model; image i has condition i % P. `batch`: images decoded at
    once, each of which leaves its row to the next as soon as it is done, unless the sampler goes in lockstep. `tokens`
    adds each image's tokens to the manifest. `settings`: guidance_scale, guidance_interval, guidance_schedule,
    temperature, top_k, top_p and invariant, as in `SamplingParams`. `name` and `drafters` are for run.json.
    With several `ranks` all of them call this with the same arguments, on one shared folder; a `crew` makes the images
    elsewhere (`visar.bulk.crew`). `progress` shows a bar on
    rank 0; it does not disable the model's own bar.

    Raises `VisarError` for bad input, for a folder with another run, and if another run is working in it.
    """
    plan = _planned(model, conditions, count, sampler, batch, seed, tokens, name, drafters, settings)
    model, order, method, settings, about = plan
    seed, batch, count, tokens = (about[key] for key in ("seed", "batch", "count", "tokens"))
    folder = RunFolder(out)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", NotInTraining)  # there may be one for each of thousands of prompts
        ranks.agree(lambda: stack.enter_context(output_folder(folder.path)))
        ranks.agree(lambda: stack.enter_context(folder.locked(ranks.rank, ranks.world)))
        done = ranks.first(lambda: _begin(folder, about, machine(model)))
        if not ranks.rank and order.kind == "class" and (extra := count % len(order.conditions)):
            warnings.warn(
                f"{count} images are no multiple of {len(order.conditions)} classes: the first {extra} get one more.",
                stacklevel=2,
            )
        bar = tqdm(
            total=count,
            initial=len(done),
            unit="image",
            smoothing=0,
            file=sys.stderr,
            disable=bool(ranks.rank) or not progress,
        )
        try:
            journal = Journal(folder, ranks.rank)
            with bar:
                one_by_one = in_rows(model, method, order.condition(0).value, settings)
                work = Work(model, order, count, done, batch, method, seed, tokens, settings, ranks, one_by_one)
                for image, line in crew(work):
                    journal.write(image, line)
                    # The other ranks have made about as many; to count their files would take ever longer.
                    bar.update(min(ranks.world, count - bar.n))
                ranks.agree(lambda: None)  # wait for all
                bar.update(count - bar.n)
            ranks.first(lambda: folder.finish(count))
        except BaseException:
            if ranks.world == 1:  # with more, another rank may be about to write
                folder.forget_if_empty()
            raise
        # While the locks are held, so that nobody changes the folder.
        return _summary(folder, count - len(done))


def check_run(
    model: Any,
    conditions: Sequence[Condition | str | int],
    out: str | Path,
    *,
    count: int | None = None,
    sampler: Any = None,
    batch: int = 16,
    seed: int = 0,
    name: str = "",
    **settings: Any,
) -> None:
    """Raise `VisarError` where `sample_images` would, of these arguments and of what is in the folder `out`."""
    plan = _planned(model, conditions, count, sampler, batch, seed, False, name, (), settings)
    RunFolder(out).check(plan.about)


class _Plan(NamedTuple):
    """What a run samples, checked, and what its run.json says of it."""

    model: ImageModel
    order: Interleaved
    method: Any
    settings: dict[str, Any]
    about: dict[str, Any]


def _planned(
    model: Any,
    conditions: Sequence[Condition | str | int],
    count: int | None,
    sampler: Any,
    batch: int,
    seed: int,
    tokens: bool,
    name: str,
    drafters: Sequence[str],
    settings: Mapping[str, Any],
) -> _Plan:
    model = ImageModel.of(model)
    model.family.check_decoding()
    seed, batch, count = _needed("seed", seed), _needed("batch", batch), whole("count", count)
    tokens = truth("tokens", tokens)
    SamplingParams(seed=seed)  # its range
    order, count = _checked(model, conditions, count, batch, tokens)
    method = sampler_of(model, sampler)
    settings = settings_of(model, settings)
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
        **({"image_size": "{1}x{0}".format(*model.family.pixels)} if model.family.sizes else {}),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return _Plan(model, order, method, settings, about)


def _needed(name: str, value: Any) -> int:
    """A whole number, of which None is none: a run without a seed could not be continued."""
    if (found := whole(name, value)) is None:
        raise VisarError(f"{name} must be a whole number, not None.")
    return found


def _checked(
    model: ImageModel, conditions: Sequence[Condition | str | int], count: int | None, batch: int, tokens: bool
) -> tuple[Interleaved, int]:
    """The order of the images, and their number. Raises `VisarError` for bad input."""
    order = Interleaved(conditions_of(conditions))
    count = len(order.conditions) if count is None else count
    if count < 1:
        raise VisarError(f"The number of images must be 1 or more, not {count}.")
    if batch < 1:
        raise VisarError(f"The batch must be 1 or more images, not {batch}.")
    if max(order.index(i) for i in range(max(0, count - len(order.conditions)), count)) >= IMAGES:
        raise VisarError(f"There are at most {IMAGES} images of one condition.")
    family = model.family
    if tokens and family.tokens != DISCRETE:
        raise VisarError("Only discrete tokens can be saved; those of this model are vectors.")
    if order.kind != family.condition:
        raise VisarError(f"This model makes images from a {family.condition}, and it was given a {order.kind}.")
    values: list[Any] = [c.value for c in order.conditions]
    family.check_conditions(values)
    if family.condition == "prompt":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # repeated when the image is made
            family.widened(family.encode(values))
    return order, count


def _begin(folder: RunFolder, about: dict[str, Any], here: Mapping[str, Any]) -> set[int]:
    """Clear the folder, write run.json, and return the ids that are done. Only with the locks of all ranks."""
    folder.clear()
    found = folder.check(about)
    before = found.get("machines", []) if found else []
    if difference := changed(before, here):
        warnings.warn(f"The run continues on another machine ({difference}): rounding may differ.", stacklevel=2)
    folder.describe(about | {"machines": before if here in before else [*before, here]})
    return {i for i in folder.done() if i < about["count"]}


def _summary(folder: RunFolder, sampled: int) -> Sampled:
    lines = folder.finished()
    return Sampled(
        folder=folder.path,
        images=len(lines),
        sampled=sampled,
        sampler=lines[0]["sampler"],
        exact=lines[0]["exact"],
        passes=statistics.fmean(line["stats"]["passes"] for line in lines),
        seconds=statistics.fmean(line["stats"]["seconds"] for line in lines),
    )
