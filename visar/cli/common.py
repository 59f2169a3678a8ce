"""What several subcommands need: a device, a sampler and a pipeline."""

from __future__ import annotations

import argparse
import copy
import errno
import re
import socket
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from visar.devices import device_of
from visar.errors import VisarError

if TYPE_CHECKING:
    from visar.families.source import Source
    from visar.generation.model import ImageModel
    from visar.samplers import AnySampler


LOAD = ("vq", "vae", "text_encoder", "image_size", "num_heads", "ema", "quantize")  # options of a model


def configured(name: str, given: list[str], window: int | None) -> AnySampler:
    """A sampler by name with parameters given as "name=value" texts; a `VisarError` for any that it has not."""
    from visar.samplers import get_sampler
    from visar.samplers.parameters import parameters_of

    sampler = get_sampler(name, window=window)
    own = parameters_of(sampler)
    values = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise VisarError(f"A parameter is given as name=value, not {text!r}.")
        if key in values or (key == "window" and window is not None):
            raise VisarError(f"Parameter {key!r} of {name!r} is given twice.")
        kind = own[key].kind if key in own else str
        if kind is bool and value not in ("true", "false"):
            raise VisarError(f"Parameter {key!r} of {name!r} must be true or false, not {value!r}.")
        try:
            values[key] = value == "true" if kind is bool else kind(value)
        except ValueError as error:
            what = "a whole number" if kind is int else "a number"
            raise VisarError(f"Parameter {key!r} of {name!r} must be {what}, not {value!r}.") from error
    return get_sampler(sampler, **values)


def samplers_of(options: argparse.Namespace) -> dict[str, AnySampler]:
    """The samplers by what they were called: a name, or a name with parameters, as in "mar:steps=32:head_steps=50".

    Parameters of --set and --window go to all that have them, but to none that was called with its own.
    """
    from visar.samplers import get_sampler
    from visar.samplers.parameters import parameters_of

    wanted = options.samplers
    if wanted is None:
        usual = default_of(options)
        wanted = {"mar-headspec": ["mar", usual], "scd": ["ar", "sjd", usual]}.get(usual, [usual])
    # A name, or FILE.py:NAME, and its parameters.
    parts = {label: re.split(r"(?<!\.py):", label) for label in wanted}
    has = {label: set(parameters_of(get_sampler(name))) for label, (name, *_) in parts.items()}
    free = {label: has[label] - {text.partition("=")[0] for text in own} for label, (_, *own) in parts.items()}
    shared = [text.partition("=")[0] for text in options.parameters if "=" in text]
    for key in shared + ["window"] * (options.window is not None):
        if not any(key in names for names in has.values()):
            what = "window" if key not in shared else f"parameter {key!r}"
            raise VisarError(f"None of these samplers has a {what}.")
        if not any(key in names for names in free.values()):
            raise VisarError(f"Each of these samplers was given its own {key}; leave out that for all.")
    made = {}
    for label, (name, *own) in parts.items():
        given = [text for text in options.parameters if "=" not in text or text.partition("=")[0] in free[label]]
        made[label] = configured(name, given + own, options.window if "window" in free[label] else None)
    return made


def source_of(options: argparse.Namespace) -> Source:
    """The model that the model options name, looked at and not loaded."""
    from visar.families.source import open_source

    return open_source(
        options.model,
        vq=options.vq,
        vae=options.vae,
        text_encoder=options.text_encoder,
        image_size=options.image_size,
        num_heads=options.num_heads,
        ema=options.ema,
    )


def tokens_of(options: argparse.Namespace) -> str:
    """The kind of tokens of a model, "discrete" or "continuous", before its weights are read."""
    from visar.families.registry import family_of

    return family_of(source_of(options)).tokens


def kind_of(options: argparse.Namespace) -> tuple[str, str]:
    """A model's kind of tokens and its `scan`, before its weights are read."""
    from visar.families.registry import family_of

    family = family_of(source := source_of(options))
    return family.tokens, family.scan_at(source)


def default_of(options: argparse.Namespace) -> str:
    """The name of a model's sampler by default, before its weights are read."""
    from visar.samplers import default_sampler

    return default_sampler(*kind_of(options))


def is_file(options: argparse.Namespace) -> bool:
    """Whether the model options ask for published files."""
    return bool(source_of(options).files)


def load_model(
    options: argparse.Namespace, condition: str | None = None, samplers: Iterable[Any] | None = None
) -> ImageModel:
    """The model that the model options ask for, where and as they want it, with its drafters (`give_drafters`).

    `condition`, "prompt" or "class", is what it shall be called with; None takes what the model is. With `samplers`, a
    drafter that none of them uses is a `VisarError`.
    """
    import torch

    from visar.generation.model import ImageModel

    device = device_of(options.device)
    model = ImageModel.load(replace(source_of(options), condition=condition))
    give_drafters(model, getattr(options, "drafter", ()), samplers)
    model.to(device)
    model.to(dtype=getattr(torch, options.dtype) if options.dtype else model.family.fastest_dtype)
    model.quantize(getattr(options, "quantize", None) or "native")
    return model


def give_drafters(model: ImageModel, paths: Iterable[str], samplers: Iterable[Any] | None = None) -> None:
    """Load those of --drafter. Raises `VisarError` for two of a kind, and with `samplers` as `check_drafters` does."""
    given: dict[str, str] = {}
    for path in paths:
        kind = model.drafters.load(path)
        if kind in given:
            raise VisarError(
                f"{given[kind]} and {path} are two drafters of the kind {kind!r}; give one --drafter of it."
            )
        given[kind] = path
    if samplers is not None:
        check_drafters(model, samplers)


def check_drafters(model: ImageModel, samplers: Iterable[Any]) -> None:
    """Raise `VisarError` for a drafter that was given and that no sampler uses; None is the model's own sampler."""
    from visar.generation.drafting import kind_for

    used = {kind_for(model.sampler_of(sampler)) for sampler in samplers}
    if idle := [kind for kind in model.drafters.loaded if kind not in used]:
        raise VisarError(f"--drafter gives one of the kind {idle[0]!r}, which no sampler here uses; leave it out.")


def each_model(options: argparse.Namespace, default: list[str]) -> list[argparse.Namespace]:
    """The options of each model of a command that takes several. Raises `VisarError` for files that fit one only."""
    wanted = options.models or default
    if len(wanted) > 1 and (options.vq or options.vae):
        raise VisarError("A published file is served alone, with its --vq or --vae; give one --model.")
    if len(wanted) > 1 and options.drafter:
        raise VisarError("A drafter is for one model; give one --model.")
    each = [copy.copy(options) for _ in wanted]
    for own, name in zip(each, wanted, strict=True):
        own.model = name
    return each


def bound(host: str, port: int) -> socket.socket:
    """A socket with this address, and for port 0 with one that is free; a `VisarError` where there is none."""
    if not 0 <= port < 65536:
        raise VisarError(f"--port must be from 0 (any that is free) to 65535, not {port}.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise VisarError(f"There is no address {host!r} to listen on; --host takes one of this machine.") from error
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise VisarError(f"{host} is no address of this machine; --host takes one that is.") from error
        why = error.strerror or str(error)
        raise VisarError(f"Cannot listen on {host}:{port} ({why}); use another --port.") from error
    return made
