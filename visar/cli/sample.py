"""`visar sample`: many images into a folder; `visar export`: a finished folder in an evaluator's layout."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visar.cli.common import configured, device_of, load_model, tokens_of
from visar.errors import VisarError
from visar.files import output_folder

if TYPE_CHECKING:
    from visar.bulk import Condition, Ranks
    from visar.samplers import AnySampler

SETTINGS = ("guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p")


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

    folders = [options.out, *([Path(options.npz).parent] if options.npz else [])]
    with ExitStack() as stack:
        # Everything that can be wrong is checked before the weights are read.
        conditions, sampler = ranks.agree(lambda: _checked(options))
        ranks.agree(lambda: _own_device(options, ranks))
        ranks.agree(lambda: [stack.enter_context(output_folder(folder)) for folder in folders])
        pipe = ranks.agree(lambda: load_model(options, "class" if options.classes else "prompt"))
        pipe.bar = {"disable": True}
        done = sample_images(
            pipe, conditions, options.out, count=options.num_images, sampler=sampler, batch=options.batch,
            seed=options.seed, tokens=options.tokens, ranks=ranks, name=options.model, drafters=options.drafter,
            progress=sys.stderr.isatty() and not options.json,
            **{name: getattr(options, name) for name in SETTINGS},
        )  # fmt: skip
        if ranks.rank == 0 and options.npz:
            export_npz(options.out, options.npz)
    if ranks.rank == 0:
        print(json.dumps(asdict(done) | {"folder": options.out}) if options.json else done)
    return 0


def _own_device(options: argparse.Namespace, ranks: Ranks) -> None:
    """Give each of several ranks the GPU of its local number; `VisarError` for a device that is not there."""
    if device_of(options.device).type == "cuda" and ranks.world > 1:
        import torch

        options.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device_of(options.device))


def _checked(options: argparse.Namespace) -> tuple[list[Condition], AnySampler | None]:
    """The conditions and the sampler, if one is named; options that cannot work are a `VisarError`."""
    from visar.bulk import RunFolder, read_classes, read_prompts
    from visar.bulk.about import FORMAT, method_of
    from visar.bulk.conditions import Interleaved
    from visar.samplers import DEFAULT_CONTINUOUS, DEFAULT_SAMPLER, ContinuousTarget, Target

    if bool(options.prompts) == bool(options.classes):
        raise VisarError("Give either --prompts FILE or --classes LIST.")
    for name, value in (("-n", options.num_images), ("--batch", options.batch)):
        if value is not None and value < 1:
            raise VisarError(f"{name} must be 1 or more, not {value}.")
    if options.npz and Path(options.npz).suffix != ".npz":
        raise VisarError(f"--npz writes a .npz file, not {options.npz}.")
    conditions = read_prompts(options.prompts) if options.prompts else read_classes(options.classes)
    masked = tokens_of(options) == "continuous"
    if masked and options.tokens:
        raise VisarError("--tokens is for models of discrete tokens; this one's are vectors.")
    default = DEFAULT_CONTINUOUS if masked else DEFAULT_SAMPLER
    said = options.sampler or options.parameters or options.window is not None
    sampler = configured(options.sampler or default, options.parameters, options.window) if said else None
    temperature = 1.0 if options.temperature is None else options.temperature
    ContinuousTarget(temperature) if masked else Target(temperature, options.top_k or 0, options.top_p)
    order = Interleaved(conditions)
    about: dict[str, Any] = {
        "format": FORMAT,
        "sampler": default if sampler is None else method_of(sampler)["sampler"],
        "settings": {name: value for name in SETTINGS if (value := getattr(options, name)) is not None},
        "seed": options.seed,
        "conditions": {"kind": order.kind, "sha256": order.mark()},
        "count": len(conditions) if options.num_images is None else options.num_images,
        "batch": options.batch,
        "tokens": options.tokens,
    }
    RunFolder(options.out).check(about)
    return conditions, sampler


def export(options: argparse.Namespace) -> int:
    from visar.bulk.export import export as write

    number = write(options.folder, options.layout, options.out)
    print(f"{options.out}: {number} images of {options.folder}")
    return 0
