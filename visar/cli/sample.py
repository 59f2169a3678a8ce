"""`visar sample`: many images into a folder; `visar export`: a finished folder in an evaluator's layout."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from visar.cli.cluster import crew_of
from visar.cli.common import default_of, load_model, tokens_of
from visar.cli.generate import chosen_sampler
from visar.cli.output import show
from visar.cli.parsers.options import params_of, settings_of
from visar.devices import device_of
from visar.errors import VisarError
from visar.files import output_folder
from visar.params import CONTINUOUS, SamplingParams

if TYPE_CHECKING:
    from visar.bulk import Condition, Ranks
    from visar.samplers import AnySampler


def sample(options: argparse.Namespace) -> int:
    from visar.bulk import ToldElsewhere, join_ranks

    with join_ranks() as ranks:
        if ranks.rank:
            warnings.simplefilter("ignore")  # rank 0 says the same
        try:
            return _sample(options, ranks)
        except ToldElsewhere:
            return 2


def _sample(options: argparse.Namespace, ranks: Ranks) -> int:
    from visar.bulk import export_npz, sample_images
    from visar.bulk.work import own_share

    with ExitStack() as stack:
        # Everything that can be wrong is checked before the weights are read.
        params = ranks.first(lambda: params_of(options))
        conditions, sampler = ranks.agree(lambda: _checked(options, params))
        ranks.agree(lambda: _own_device(options, ranks))
        ranks.agree(lambda: stack.enter_context(output_folder(options.out)))
        kind = "class" if options.classes else "prompt"
        crew, here = ranks.agree(lambda: crew_of(options, kind, stack))
        model = ranks.agree(lambda: load_model(here, kind, [sampler]))
        model.bar = {"disable": True}
        done = sample_images(
            model, conditions, options.out, count=options.num_images, sampler=sampler, batch=options.batch,
            tokens=options.tokens, ranks=ranks, crew=crew or own_share, name=options.model, drafters=options.drafter,
            progress=sys.stderr.isatty() and options.json is None, **settings_of(params),
        )  # fmt: skip
        if ranks.rank == 0 and options.npz:
            export_npz(options.out, options.npz)
    if ranks.rank == 0:
        show(options, str(done), asdict(done) | {"folder": options.out})
    return 0


def _own_device(options: argparse.Namespace, ranks: Ranks) -> None:
    """Give each of several ranks the GPU of its local number; `VisarError` for a device that is not there."""
    if device_of(options.device).type == "cuda" and ranks.world > 1:
        import torch

        options.device = f"cuda:{os.environ.get('LOCAL_RANK', ranks.rank)}"
        torch.cuda.set_device(device_of(options.device))


def _checked(options: argparse.Namespace, params: SamplingParams) -> tuple[list[Condition], AnySampler | None]:
    """The conditions and the sampler, if one is named; options that cannot work are a `VisarError`."""
    from visar.bulk import RunFolder, read_classes, read_prompts
    from visar.bulk.about import FORMAT, method_of
    from visar.bulk.conditions import Interleaved
    from visar.bulk.export import new_npz

    if bool(options.prompts) == bool(options.classes):
        raise VisarError("Give either --prompts FILE or --classes LIST.")
    conditions = read_prompts(options.prompts) if options.prompts else read_classes(options.classes)
    kind = tokens_of(options)
    if kind == CONTINUOUS and options.tokens:
        raise VisarError("--tokens is for models of discrete tokens; this one's are vectors.")
    sampler = chosen_sampler(options, params)
    if options.npz:
        new_npz(options.npz)
    order = Interleaved(conditions)
    settings = settings_of(params)
    about: dict[str, Any] = {
        "format": FORMAT,
        "sampler": default_of(options) if sampler is None else method_of(sampler)["sampler"],
        "seed": settings.pop("seed"),
        "settings": settings,
        "conditions": {"kind": order.kind, "sha256": order.mark()},
        "count": len(conditions) if options.num_images is None else options.num_images,
        "batch": options.batch,
        "tokens": options.tokens,
    }
    RunFolder(options.out).check(about)
    return conditions, sampler


def export(options: argparse.Namespace) -> int:
    from visar.bulk.export import export as write

    count = write(options.folder, options.layout, options.out)
    print(f"{options.out}: {count} images of {options.folder}")
    return 0
