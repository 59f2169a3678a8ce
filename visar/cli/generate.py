"""`visar generate`: images from prompts or classes."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from visar.cli.common import configured, load_model, tokens_of
from visar.cli.output import check_json, show
from visar.cli.parsers.options import params_of, settings_of
from visar.errors import VisarError
from visar.files import output_folder, replacing
from visar.params import SamplingParams

if TYPE_CHECKING:
    from visar.generation.stats import DecodeStats
    from visar.samplers import AnySampler


def output_paths(out: str | None, names: list[str], force: bool = False) -> list[Path]:
    """Where the images go: the given .png file (numbered if there are several), or files named after the prompts.

    In a folder, names that are taken get a number. Raises `VisarError` for a given file that exists. With `force` both
    are overwritten.
    """
    path = Path(out or ".")
    if path.suffix and not path.is_dir():
        if path.suffix.lower() != ".png":
            raise VisarError(f"Images are written as .png, not {path.suffix}; give a .png file or a folder.")
        paths = [path if len(names) == 1 else path.with_stem(f"{path.stem}-{i}") for i in range(len(names))]
        if not force and (old := next((p for p in paths if p.exists()), None)):
            raise VisarError(f"{old} exists; give --force to overwrite it, or another --out.")
        return paths
    stems = [re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "image" for name in names]
    found: list[Path] = []
    for stem in stems:
        numbered = (path / f"{stem}{f'-{i}' if i else ''}.png" for i in itertools.count())
        found.append(next(p for p in numbered if p not in found and (force or not p.exists())))
    return found


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
    names = [n for n in (prompts or [f"class {c}" for c in classes]) for _ in range(options.num_images)]
    # Everything that can be wrong is checked before the weights are read.
    params = params_of(options)
    sampler = chosen_sampler(options, params)
    check_json(options)
    paths = output_paths(options.out, names, options.force)
    with output_folder(paths[0].parent):  # first of all, so that nothing is computed that cannot be saved
        stats = _write(options, params, sampler, paths)
    show(options, "\n".join(map(str, [*paths, stats])), stats.to_dict() | {"images": [str(p) for p in paths]})
    return 0


def chosen_sampler(options: argparse.Namespace, params: SamplingParams) -> AnySampler | None:
    """The sampler, or None if the options say nothing of it. Raises `VisarError` for settings the model has not."""
    from visar.samplers import DEFAULTS

    tokens = tokens_of(options)
    params.check(tokens)
    if not options.sampler and not options.parameters and options.window is None:
        return None
    return configured(options.sampler or DEFAULTS[tokens], options.parameters, options.window)


def _write(
    options: argparse.Namespace, params: SamplingParams, sampler: AnySampler | None, paths: list[Path]
) -> DecodeStats:
    model = load_model(options, "class" if options.classes else "prompt")
    model.bar = {"disable": not sys.stderr.isatty() or options.json is not None}
    out = model.generate(
        options.classes or options.prompt,
        sampler=sampler,
        num_images=options.num_images,
        **settings_of(params),
    )
    for image, path in zip(out.images, paths, strict=True):
        with replacing(path) as temporary:
            image.save(temporary)
    return out.stats
