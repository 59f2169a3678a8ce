"""What `visar train drafter` and `visar train jacobi` learn from: images that the model of their options samples."""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from visar.cli.parsers.options import params_of, settings_of
from visar.devices import device_of
from visar.errors import VisarError
from visar.files import writable_folder
from visar.params import CONTINUOUS, DISCRETE
from visar.texts import lines_of, read_text


def _conditions(options: argparse.Namespace, classes: int) -> list[Any]:
    """The captions or class ids to sample, `classes` being 0 for text: lines of a file, or prompts of a set."""
    images = (
        not classes
        and options.captions
        and (Path(options.captions).is_dir() or Path(options.captions).suffix == ".zip")
    )
    if (options.styles or options.without_groups) and not images:
        raise VisarError("--styles and --without-groups choose from an image set, and --captions is none.")
    if not options.captions:
        if classes:
            return list(range(classes))
        raise VisarError("A text model needs --captions: a file with a caption in each line, or an image set.")
    path = Path(options.captions)
    if images:
        from visar.training.data import ImageSet

        data = ImageSet(path, tuple(options.styles), tuple(options.without_groups))
        prompts = list(dict.fromkeys(data.records[i].prompt() for i in data.indices("train")))
        random.Random(0).shuffle(prompts)  # a set has one style after the other, and --num-images may end within it
        return prompts
    if path.suffix.lower() in (".json", ".jsonl", ".csv", ".tsv"):
        raise VisarError(f"--captions takes a text file with one in each line, or an image set, not {path}.")
    found: list[Any] = [line.strip() for line in lines_of(read_text(path)) if line.strip()]
    if not found:
        raise VisarError(f"{path} holds no captions.")
    if classes:
        for line in found:
            if not line.isdecimal() or int(line) >= classes:
                raise VisarError(f"{path} must hold a class id from 0 to {classes - 1} in each line, not {line!r}.")
        found = [int(line) for line in found]
    return list(dict.fromkeys(found))  # sampled in turns: a caption given twice would give one image twice


class Source(NamedTuple):
    """What samples the images that are learnt from, in float32 on a CPU: small updates are lost in bfloat16."""

    options: argparse.Namespace
    out: Path
    run: str  # the folder of the run, in `out`
    model: Any
    conditions: list[Any]
    params: Any
    rank: int

    def sampled(self, **how: Any) -> Any:
        """The images, as `visar.training.self_generated.generate_tokens` gives them; kept in the folder of the run."""
        from visar.training.loop import check_state
        from visar.training.self_generated import generate_tokens

        check_state(self.out / self.run, self.made_of())
        count = self.options.num_images
        return generate_tokens(
            self.model, self.conditions, count, self.out / "images.safetensors", self.options.batch,
            lambda done: print(f"{done} of {count} images sampled", file=sys.stderr),
            waits=self.rank != 0, **how, **settings_of(self.params),
        )  # fmt: skip

    def encoded(self, rows: list[int]) -> tuple[Any, Any]:
        """The conditions of the images with these numbers, and their mask."""
        family, conditions = self.model.family, self.conditions
        given: Any = family.drafting.given(family.encode([conditions[i % len(conditions)] for i in rows]))
        return given

    def config(self, **extra: Any) -> Any:
        from visar.training.loop import TrainConfig

        options = self.options
        return TrainConfig(
            self.out, minutes=math.inf if options.steps else options.minutes, steps=options.steps or 10**9,
            batch=options.batch, lr=options.lr, seed=self.params.seed, ema=0.99,
            compile=not options.no_compile, device=str(self.model.device),
            made_of=self.made_of(), held=True, **extra,
        )  # fmt: skip

    def made_of(self) -> dict[str, Any]:
        """The options that a run keeps when it goes on; what is in the images is kept with these."""
        names = ("depth", "num_images")  # of more images, others are held out
        return {name: getattr(self.options, name) for name in names if hasattr(self.options, name)}

    def how(self) -> tuple[Any, Any]:
        """The guidance and the target of the images."""
        from visar.engine.guidance import Guidance
        from visar.samplers import Target

        params = self.params
        return Guidance(params.guidance_scale), Target(params.temperature, params.top_k, params.top_p)


@contextmanager
def learning(options: argparse.Namespace, continuous: str, run: str, check: Callable[[Path], None]) -> Iterator[Source]:
    """The model of the options, for what learns from its images; `continuous` says what is wrong with a MAR.

    `run` is the folder of the run within that of the options, which is looked at by `check`, and then held.
    """
    from visar.cli.common import load_model, tokens_of
    from visar.training.loop import alone, distributed

    if tokens_of(options) == CONTINUOUS:
        raise VisarError(continuous)
    params: Any = params_of(options)
    params.check(DISCRETE)
    out = writable_folder(options.out)  # before the work
    check(out)
    with alone(writable_folder(out / run)):
        rank, _, own = distributed(str(device_of(options.device)))
        options.device = str(own)
        if own.type == "cpu" and options.dtype is None:
            options.dtype = "float32"
        model = load_model(options)
        model.bar = {"disable": True}
        conditions = _conditions(options, model.family.classes)
        yield Source(options, out, run, model, conditions, params.resolved(model.family.defaults), rank)
