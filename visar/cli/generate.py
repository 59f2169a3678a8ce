"""`visar generate`: images from prompts or classes."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from visar.cli.common import configured, load_model, tokens_of
from visar.errors import VisarError
from visar.files import output_folder, replacing

if TYPE_CHECKING:
    from visar.generation.stats import DecodeStats
    from visar.samplers import AnySampler


def output_paths(output: str | None, names: list[str]) -> list[Path]:
    """Where the images go: the given .png file (numbered if there are several), or files named after the prompts."""
    path = Path(output or ".")
    if path.suffix and not path.is_dir():
        if path.suffix.lower() != ".png":
            raise VisarError(f"Images are written as .png, not {path.suffix}; give a .png file or a folder.")
        return [path if len(names) == 1 else path.with_stem(f"{path.stem}-{i}") for i in range(len(names))]
    stems = [re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "image" for name in names]
    out: list[Path] = []
    for stem in stems:
        numbered = (path / f"{stem}{f'-{i}' if i else ''}.png" for i in itertools.count())
        out.append(next(file for file in numbered if file not in out))
    return out


def generate(options: argparse.Namespace) -> int:
    prompts, classes = options.prompt, options.classes
    if bool(prompts) == bool(classes):
        raise VisarError("Give either prompts or --class IDs.")
    if any(not p.strip() for p in prompts):
        raise VisarError("The prompt is empty; give at least one word.")
    if len(prompts) > 1 and all(len(p.split()) == 1 for p in prompts):
        warnings.warn(
            f"These are {len(prompts)} prompts of one word each; put quotes around several words.", stacklevel=1
        )
    if options.num_images < 1:
        raise VisarError(f"-n must be 1 or more, not {options.num_images}.")
    names = [n for n in (prompts or [f"class {c}" for c in classes]) for _ in range(options.num_images)]
    from visar.samplers import DEFAULT_CONTINUOUS, DEFAULT_SAMPLER, ContinuousTarget, Target

    # Everything that can be wrong is checked before the weights are read.
    masked = tokens_of(options) == "continuous"
    default = DEFAULT_CONTINUOUS if masked else DEFAULT_SAMPLER
    said = options.sampler or options.parameters or options.window is not None
    sampler = configured(options.sampler or default, options.parameters, options.window) if said else None
    temperature = 1.0 if options.temperature is None else options.temperature
    ContinuousTarget(temperature) if masked else Target(temperature, options.top_k or 0, options.top_p)
    paths = output_paths(options.output, names)
    with output_folder(paths[0].parent):  # first of all, so that nothing is computed that cannot be saved
        stats = _write(options, sampler, paths)
    if options.json:
        print(json.dumps(stats.to_dict() | {"images": [str(p) for p in paths]}))
    else:
        for path in paths:
            print(path)
        print(stats)
    return 0


def _write(options: argparse.Namespace, sampler: AnySampler | None, paths: list[Path]) -> DecodeStats:
    pipe = load_model(options, "class" if options.classes else "prompt")
    pipe.bar = {"disable": options.json or not sys.stderr.isatty()}
    out = pipe(
        options.classes or options.prompt,
        sampler=sampler, num_images=options.num_images, seed=options.seed,
        guidance_scale=options.guidance_scale, guidance_schedule=options.guidance_schedule,
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
    )  # fmt: skip
    for image, path in zip(out.images, paths, strict=True):
        with replacing(path) as temporary:
            image.save(temporary)
    return out.stats
