"""`visar generate`: images from prompts or classes."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from visar.cli.common import LOAD, configured, default_of, kind_of, load_model
from visar.cli.output import show
from visar.cli.parsers.generate import MOST
from visar.cli.parsers.options import params_of, settings_of
from visar.errors import VisarError
from visar.files import check_output, replacing
from visar.image_files import most_pixels
from visar.params import SamplingParams
from visar.recipe import Recipe
from visar.texts import check_prompt
from visar.user_code import is_place

if TYPE_CHECKING:
    from visar.generation.stats import DecodeStats
    from visar.samplers import AnySampler


def output_paths(out: str | None, names: list[str], force: bool = False) -> list[Path]:
    """Where the images go: the given .png file (numbered if there are several), or files named after the prompts.

    In a folder, names that are taken get a number. Raises `VisarError` for a given file that exists. With `force` both
    are overwritten.
    """
    path = Path(out or ".")
    folder = path.is_dir() or (out or "").endswith(os.sep)
    if not folder and (suffix := re.search(r"(?<=.)\.[a-z]\w*$", path.name, re.I)):  # that of out_v1.0 is none
        if suffix[0].lower() != ".png":
            raise VisarError(
                f"Images are written as .png, not {suffix[0]}; give a .png file, or a folder, with a / at its end."
            )
        paths = [path if len(names) == 1 else path.with_stem(f"{path.stem}-{i}") for i in range(len(names))]
        if not force and (old := next((p for p in paths if p.exists()), None)):
            raise VisarError(f"{old} exists; give --force to overwrite it, or another --out.")
        return paths
    stems = [re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "image" for name in names]
    taken = set() if force or not path.is_dir() else set(os.listdir(path))
    numbers: dict[str, Iterator[int]] = {}  # those of a stem go on where its last name was found
    found: list[Path] = []
    for stem in stems:
        numbered = (f"{stem}{f'-{i}' if i else ''}.png" for i in numbers.setdefault(stem, itertools.count()))
        taken.add(name := next(n for n in numbered if n not in taken))
        found.append(path / name)
    return found


def generate(options: argparse.Namespace) -> int:
    prompts = options.prompt = [as_typed(prompt) for prompt in options.prompt]
    classes = options.classes
    if bool(prompts) == bool(classes):
        raise VisarError("Give either prompts or --class IDs.")
    if any(not p.strip() for p in prompts):
        raise VisarError("The prompt is empty; give at least one word.")
    for prompt in prompts:
        check_prompt(prompt)
    if len(prompts) > 1 and all(len(p.split()) == 1 for p in prompts):
        warnings.warn(
            f"These are {len(prompts)} prompts of one word each; put quotes around several words.", stacklevel=1
        )
    if (count := (len(prompts) or len(classes)) * options.num_images) > MOST:
        raise VisarError(
            f"`visar generate` decodes its images at once, {MOST} at most, not {count}; use `visar sample`."
        )
    names = [n for n in (prompts or [f"class {c}" for c in classes]) for _ in range(options.num_images)]
    # Everything that can be wrong is checked before the weights are read.
    params = params_of(options)
    sampler = chosen_sampler(options, params)
    paths = output_paths(options.out, names[:1] if options.grid else names, options.force)
    for path in paths:  # first of all, so that nothing is computed that cannot be saved
        if path == paths[0] or os.path.lexists(path):
            check_output(path)
    stats = _write(options, params, sampler, paths)
    show(options, "\n".join(map(str, [*paths, stats])), stats.to_dict() | {"images": [str(p) for p in paths]})
    return 0


def as_typed(prompt: str) -> str:
    """A prompt in UTF-8 that Python has read in the encoding of a locale that knows ASCII only."""
    try:
        return prompt.encode("ascii", "surrogateescape").decode()
    except UnicodeError:  # one that was read well, or is no UTF-8, which `check_prompt` tells
        return prompt


def chosen_sampler(options: argparse.Namespace, params: SamplingParams) -> AnySampler | None:
    """The sampler, or None if the options say nothing of it. Raises `VisarError` for settings the model has not."""
    params.check(*kind_of(options))
    if not options.sampler and not options.parameters and options.window is None:
        return None
    return configured(options.sampler or default_of(options), options.parameters, options.window)


def _write(
    options: argparse.Namespace, params: SamplingParams, sampler: AnySampler | None, paths: list[Path]
) -> DecodeStats:
    from visar.cli.preview import Preview, bar, grid, protocol

    model = load_model(options, "class" if options.classes else "prompt", [sampler])
    quiet, form = options.json is not None, options.preview
    if form == "auto":
        form = protocol(sys.stderr)
    looks = form != "none" and not quiet and sys.stderr.isatty()
    model.bar = {"disable": True} if quiet or looks else bar(sys.stderr)
    conditions = options.classes or options.prompt
    _check_size(options, model.family.pixels, len(conditions) * options.num_images)
    out = model.generate(
        conditions,
        sampler=sampler,
        num_images=options.num_images,
        callback=Preview(sys.stderr, form) if looks else None,
        **settings_of(params),
    )
    dtype, method = str(model.dtype).removeprefix("torch."), model.sampler_of(sampler)
    images, recipes = out.images, _recipes(options, method, params, conditions, dtype)
    if options.grid:
        images = [grid(images)]
    with ExitStack() as stack:  # all images, or none
        for image, recipe, path in zip(images, recipes, paths, strict=True):
            if options.scale > 1:
                image = image.resize([side * options.scale for side in image.size], Image.Resampling.NEAREST)
            image.save(stack.enter_context(replacing(path)), pnginfo=recipe.info())
    return out.stats


def _check_size(options: argparse.Namespace, size: tuple[int, int], count: int) -> None:
    """Raise `VisarError` for a grid or a scale that makes a file too large to be read again."""
    from visar.cli.preview import squarish

    across = squarish(count) if options.grid else 1
    down = -(-count // across) if options.grid else 1
    height, width = size[0] * down * options.scale, size[1] * across * options.scale
    if (options.grid or options.scale > 1) and height * width > most_pixels():
        cure = "give a smaller --scale" if options.scale > 1 else "leave out --grid"
        raise VisarError(
            f"The file would have {width} x {height} pixels, of which Pillow reads {most_pixels()} at most; {cure}."
        )


def _recipes(
    options: argparse.Namespace, method: Any, params: SamplingParams, conditions: Any, dtype: str
) -> list[Recipe]:
    """How each file was made."""
    load = [(name.replace("_", "-"), value) for name in LOAD if (value := getattr(options, name)) is not None]
    load += [("drafter", path) for path in options.drafter]
    common: dict[str, Any] = {
        "model": options.model, "settings": settings_of(params), "dtype": dtype, "load": load, "scale": options.scale,
        "decoded": len(conditions) * options.num_images,
        "place": options.sampler if is_place(options.sampler or "") else "",
    }  # fmt: skip
    kind = "label" if options.classes else "prompt"
    if options.grid:
        first, *others = conditions
        return [Recipe.of(method, image=options.num_images - 1, grid=True, others=others, **{kind: first}, **common)]
    return [
        Recipe.of(method, image=number, **{kind: condition}, **common)
        for condition in conditions
        for number in range(options.num_images)
    ]
