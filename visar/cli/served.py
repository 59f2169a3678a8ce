"""What `visar serve` serves, with Ray or without: the models with their samplers, and the keys of its clients."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from visar.cli.common import check_drafters, configured, each_model, load_model, samplers_of
from visar.errors import VisarError
from visar.texts import lines_of, read_text

if TYPE_CHECKING:
    from visar.generation.model import ImageModel
    from visar.serving.replica import Served

KEY = "VISAR_API_KEY"
IMAGES = 10  # of a request, at most, unless --max-images says otherwise
LEAST_KEY = 8  # characters of an API key


def models_of(options: argparse.Namespace) -> list[Served]:
    """The loaded models, with the samplers that run for each."""
    from visar.serving.replica import Served, named

    loaded = named((own.model, load_model(own)) for own in each_model(options, ["icons"]))
    for model in loaded.values():
        model.family.check_decoding()
    chosen = _samplers(options, loaded)
    return [Served(name, model, chosen[name], options.invariant) for name, model in loaded.items()]


def _samplers(options: argparse.Namespace, models: Mapping[str, ImageModel]) -> dict[str, dict[str, Any]]:
    """The samplers of each model by their labels: those that were asked for and fit its tokens, or its default."""
    from visar.samplers import check_sampler, default_sampler

    def fits(sampler: Any, model: ImageModel) -> bool:
        try:
            check_sampler(sampler, model.family.tokens, model.family.scan)
        except VisarError:
            return False
        return True

    asked: dict[str, Any] = dict(samplers_of(options)) if options.samplers else {}
    for sampler in asked.values():
        if not any(fits(sampler, model) for model in models.values()):
            first = next(iter(models.values())).family
            check_sampler(sampler, first.tokens, first.scan)  # which says why
    found: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        own = {label: sampler for label, sampler in asked.items() if fits(sampler, model)}
        if not own:
            default = default_sampler(model.family.tokens, model.family.scan)
            plain = options.window is None and not options.parameters
            own = {default: None if plain else configured(default, options.parameters, options.window)}
        found[name] = {label: model.sampler_of(sampler) for label, sampler in own.items()}
        check_drafters(model, found[name].values())
        for sampler in found[name].values():
            model.drafters.of(sampler)  # an error where it is missing
    return found


def most_images(options: argparse.Namespace) -> int:
    """Images of a request, at most. Raises `VisarError` for more than there is room for, which none would ever get."""
    engines = options.replicas[0] if options.replicas else 1
    room = options.rows * engines + options.waiting
    if options.max_images is None:
        return min(IMAGES, room)
    if options.max_images > room:
        raise VisarError(
            f"--max-images {options.max_images} is more than --rows and --waiting have room for, {room}: such a "
            "request would always be refused."
        )
    return int(options.max_images)


def keys_of(file: str | None) -> list[str]:
    """API keys: the lines of a file, or the one of the environment. Raises `VisarError` for one that is none."""
    if file is not None:
        found = [line.strip() for line in lines_of(read_text(file)) if line.strip()]
        if not found:
            raise VisarError(f"{file} has no API key; give one a line.")
    else:
        found = [key] if (key := os.environ.get(KEY, "").strip()) else []
    for key in found:
        if len(key) < LEAST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise VisarError(
                f"An API key has {LEAST_KEY} or more ASCII characters, and no space; one of these has not."
            )
    return found
