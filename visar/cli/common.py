"""What several subcommands need: a device, a sampler and a pipeline."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from visar.errors import VisarError

if TYPE_CHECKING:
    import torch

    from visar.pipelines.base import ImagePipeline
    from visar.samplers import Sampler


def configured(name: str, given: list[str], window: int | None) -> Sampler:
    """A sampler by name with parameters given as "name=value" texts; a `VisarError` for any that it has not."""
    from visar.samplers import SAMPLERS, get_sampler

    sampler = get_sampler(name, window=window)
    defaults = SAMPLERS[name].parameters()
    values = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise VisarError(f"A parameter is given as name=value, not {text!r}.")
        kind = type(defaults.get(key, ""))
        try:
            values[key] = kind(value)
        except ValueError as error:
            what = "a whole number" if kind is int else "a number"
            raise VisarError(f"Parameter {key!r} of {name!r} must be {what}, not {value!r}.") from error
    return get_sampler(sampler, **values)


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


def is_class_model(model: str, single_file: bool) -> bool:
    """Whether a model takes classes, by its index or by the tensors of its file."""
    if single_file:
        from visar.models.loading import load_state

        return any(key.startswith("cls_embedding.embedding_table") for key in load_state(model))
    from visar.models.specs import resolve_model

    index = Path(resolve_model(model)) / "model_index.json"
    return index.exists() and "ClassToImagePipeline" in index.read_text()


def load_pipeline(options: argparse.Namespace, classes: bool | None = None) -> ImagePipeline:
    """The pipeline that the model options ask for.

    `classes` says which kind is wanted; None takes what the model is.
    """
    import torch

    device = device_of(options.device)
    dtype = getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    from diffusers.utils import logging

    from visar.pipelines import ClassToImagePipeline, TextToImagePipeline

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    single_file = Path(options.model).suffix in (".pt", ".pth", ".safetensors") or bool(options.vq)
    if classes is None:
        classes = is_class_model(options.model, single_file)
    kind = ClassToImagePipeline if classes else TextToImagePipeline
    if single_file:
        if not options.vq:
            raise VisarError("A published GPT file needs its tokenizer too: give it with --vq FILE.")
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
    return pipe.to(device, dtype)
