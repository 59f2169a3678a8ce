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
    there = copy.copy(here)
    there.device = options.device
    for name in ("model", "vq", "vae", "text_encoder"):  # paths of here, for processes that begin elsewhere
        if (value := getattr(there, name)) and os.path.exists(value):
            setattr(there, name, str(Path(value).absolute()))
    there.drafter = [str(Path(path).absolute()) for path in there.drafter]
    load: Callable[[], Any] = partial(load_model, there, condition)
    return Crew(load, options.workers, options.ray_address, options.device), here


def spread(options: argparse.Namespace, stack: ExitStack) -> Extractor | None:
    """The protocol's extractor on all workers; None without a launcher."""
    check_cluster(options)
    if options.launcher is None:
        return None
    from visar.cluster import connected
    from visar.eval.quality.extractors.spread import Spread
    from visar.eval.quality.protocols import get_protocol

    name, weights = get_protocol(options.protocol).extractor, options.weights and str(Path(options.weights).absolute())
    ray = stack.enter_context(connected(options.ray_address))
    workers = options.workers or max(1, int(ray.cluster_resources().get("GPU", 0)))
    found = Spread(partial(_extractor, name, weights, options.device), workers, options.device)
    stack.callback(found.close)
    return found


def _extractor(name: str, weights: str | None, device: str) -> Extractor:
    from visar.devices import device_of
    from visar.eval.quality.extractors import get_extractor

    return get_extractor(name, device_of(device), weights)
