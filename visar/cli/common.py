"""What several subcommands need: a device, a sampler and a pipeline."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from visar.errors import VisarError

if TYPE_CHECKING:
    import torch

    from visar.pipelines.base import ImagePipeline
    from visar.samplers import AnySampler


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

    Parameters of --set go to all that have them.
    """
    from visar.samplers import get_sampler
    from visar.samplers.parameters import parameters_of

    wanted = options.samplers
    if wanted is None:
        wanted = ["mar", "mar-headspec"] if is_masked(options) else ["ar", "sjd", "scd"]
    # A name, or FILE.py:NAME, and its parameters.
    parts = {label: re.split(r"(?<!\.py):", label) for label in wanted}
    has = {label: set(parameters_of(get_sampler(name))) for label, (name, *_) in parts.items()}
    for text in options.parameters:
        if "=" in text and not any(text.partition("=")[0] in names for names in has.values()):
            raise VisarError(f"None of these samplers has a parameter {text.partition('=')[0]!r}.")
    if options.window is not None and not any("window" in names for names in has.values()):
        raise VisarError("None of these samplers has a window.")
    return {
        label: configured(
            name,
            [text for text in options.parameters if "=" not in text or text.partition("=")[0] in has[label]] + own,
            options.window if "window" in has[label] else None,
        )
        for label, (name, *own) in parts.items()
    }


def device_of(name: str) -> torch.device:
    """The device of a name, "auto" being the GPU where there is one; a `VisarError` if it is not there."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise VisarError(f"Unknown device {name!r}; use auto, cpu, cuda or cuda:N.") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise VisarError(f"Device {name!r} is not there; this machine has {count} CUDA devices.")
    if device.type not in ("cpu", "cuda"):
        raise VisarError(f"Device {name!r} is not supported; use auto, cpu, cuda or cuda:N.")
    return device


def _class_of(model: str) -> str:
    """The pipeline that a model's folder says it holds; "" for what is not on this machine or says nothing."""
    from visar.families.specs import resolve_model

    index = Path(resolve_model(model)) / "model_index.json"
    try:
        return str(json.loads(index.read_text()).get("_class_name", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def is_class_model(options: argparse.Namespace) -> bool:
    """Whether a model takes classes, by its index or by the tensors of its file."""
    if options.vae:
        return True
    if is_file(options):
        from visar.families.llamagen.loading import load_state

        return any(key.startswith("cls_embedding.embedding_table") for key in load_state(options.model))
    return _class_of(options.model).endswith("ClassToImagePipeline")


def is_file(options: argparse.Namespace) -> bool:
    """Whether the model options ask for published files."""
    return Path(options.model).suffix in (".pt", ".pth", ".safetensors") or bool(options.vq or options.vae)


def is_masked(options: argparse.Namespace) -> bool:
    """Whether a model is one of continuous tokens, before its weights are read."""
    return bool(options.vae) if is_file(options) else _class_of(options.model).startswith("Masked")


def load_pipeline(options: argparse.Namespace, classes: bool | None = None) -> ImagePipeline:
    """The pipeline that the model options ask for.

    `classes` says which kind is wanted; None takes what the model is.
    """
    import torch

    device = device_of(options.device)
    from diffusers.utils import logging

    from visar.pipelines import ClassToImagePipeline, TextToImagePipeline

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if classes is None:
        classes = is_class_model(options)
    kind = ClassToImagePipeline if classes else TextToImagePipeline
    if options.vae:
        if options.vq or options.text_encoder or options.image_size is not None:
            raise VisarError("--vae goes with a MAR file, which takes no --vq, --text-encoder or --image-size.")
        if not classes:
            raise VisarError("A published MAR draws classes: give --class IDs instead of prompts.")
        pipe = ClassToImagePipeline.from_single_file(
            mar=options.model, vae=options.vae, num_heads=options.num_heads
        )  # fmt: skip
    elif is_file(options):
        if not options.vq:
            raise VisarError(
                "A published GPT file needs its tokenizer too: give it with --vq FILE, a MAR its --vae FILE."
            )
        wanted = ["image_size", "num_heads"] + (["text_encoder"] if not classes else [])
        extra = {name: value for name in wanted if (value := getattr(options, name)) is not None}
        pipe = kind.from_single_file(options.model, vq=options.vq, **extra)
    elif any(value is not None for value in (options.text_encoder, options.image_size, options.num_heads)):
        raise VisarError(
            "--text-encoder, --image-size and --num-heads go with a published .pt file; a folder brings its own."
        )
    else:
        pipe = kind.from_pretrained(options.model)
    for drafter in getattr(options, "drafter", ()):
        pipe.load_drafter(drafter)
    pipe = pipe.to(device)
    pipe = pipe.to(getattr(torch, options.dtype) if options.dtype else pipe.fastest_dtype)
    pipe.quantize(getattr(options, "quantize", None) or "native")
    return pipe
