"""What several subcommands need: a device, a pipeline, tables."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from visar.errors import VisarError

if TYPE_CHECKING:
    import torch

    from visar.pipelines.base import ImagePipeline


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


def load_pipeline(options: argparse.Namespace, classes: bool = False) -> ImagePipeline:
    """The pipeline that `--model`, `--vq`, `--text-encoder`, `--image-size`, `--device` and `--dtype` ask for."""
    import torch

    device = device_of(options.device)
    dtype = getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    from diffusers.utils import logging

    from visar.pipelines import ClassToImagePipeline, TextToImagePipeline

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    kind = ClassToImagePipeline if classes else TextToImagePipeline
    if Path(options.model).suffix in (".pt", ".pth", ".safetensors") or options.vq:
        if not options.vq:
            raise VisarError("A published GPT file needs its tokenizer too: give it with --vq FILE.")
        extra = {"image_size": options.image_size} if options.image_size else {}
        if options.text_encoder and not classes:
            extra["text_encoder"] = options.text_encoder
        pipe = kind.from_single_file(options.model, vq=options.vq, **extra)
    else:
        pipe = kind.from_pretrained(options.model)
    return pipe.to(device, dtype)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns of text."""
    cells = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)
