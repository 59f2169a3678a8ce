"""The workers that a command shares its work with, on a Ray cluster."""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visar.cli.common import load_model
from visar.errors import VisarError

if TYPE_CHECKING:
    from visar.bulk.crew import Crew
    from visar.eval.quality.extractors import Extractor


def check_cluster(options: argparse.Namespace) -> None:
    """A `VisarError` for options of a launcher without one."""
    for name, value in (("--workers", options.workers), ("--ray-address", options.ray_address)):
        if value is not None and options.launcher is None:
            raise VisarError(f"{name} is of --launcher ray, which is not given.")


def crew_of(options: argparse.Namespace, condition: str, stack: ExitStack) -> tuple[Crew | None, argparse.Namespace]:
    """The crew that makes the images, None without a launcher, and the options for the model of this process.

    With a crew that model stays on the CPU, in the dtype of the workers' models.
    """
    check_cluster(options)
    if options.launcher is None:
        return None, options
    from visar.bulk.crew import Crew
    from visar.cluster import connected, devices

    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise VisarError("--launcher ray takes the place of torchrun; start one process.")
    ray = stack.enter_context(connected(options.ray_address))
    here = copy.copy(options)
    here.device = "cpu"
    if devices(ray, options.device)["num_gpus"] and options.dtype is None:
        here.dtype = "bfloat16"
    there = elsewhere(here)
    there.device = options.device
    load: Callable[[], Any] = partial(load_model, there, condition)
    return Crew(load, options.workers, options.ray_address, options.device), here


def elsewhere(options: argparse.Namespace) -> argparse.Namespace:
    """The same options for processes that begin in another folder."""
    there = copy.copy(options)
    for name in ("model", "models", "vq", "vae", "text_encoder", "drafter"):
        value = getattr(there, name, None)
        setattr(there, name, [_path(one) for one in value] if isinstance(value, list) else value and _path(value))
    return there


def _path(name: str) -> str:
    """A name of a model as it is, a path in full."""
    return str(Path(name).absolute()) if os.path.exists(name) else name


def spread(options: argparse.Namespace, stack: ExitStack) -> Extractor | None:
    """The protocol's extractor on all workers; None without a launcher."""
    check_cluster(options)
    if options.launcher is None:
        return None
    from visar.cluster import connected, workers_of
    from visar.eval.quality.extractors.spread import Spread
    from visar.eval.quality.protocols import get_protocol

    name, weights = get_protocol(options.protocol).extractor, options.weights and str(Path(options.weights).absolute())
    ray = stack.enter_context(connected(options.ray_address))
    workers = workers_of(ray, options.workers, options.device)
    found = Spread(partial(_extractor, name, weights, options.device), workers, options.device)
    stack.callback(found.close)
    return found


def _extractor(name: str, weights: str | None, device: str) -> Extractor:
    from visar.devices import device_of
    from visar.eval.quality.extractors import get_extractor

    return get_extractor(name, device_of(device), weights)
