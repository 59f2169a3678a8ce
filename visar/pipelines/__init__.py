"""Pipelines with diffusers' API: from a prompt or a class to images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visar.generation.output import ImageOutput
from visar.pipelines.base import FILES, ImagePipeline
from visar.pipelines.class_to_image import ClassToImagePipeline
from visar.pipelines.text_to_image import TextToImagePipeline
from visar.pipelines.wrapped import wrapped

PIPELINES: dict[str, type[ImagePipeline]] = {"prompt": TextToImagePipeline, "class": ClassToImagePipeline}


def load(name: str | Path, **options: Any) -> ImagePipeline:
    """The right pipeline for a name of `visar models`, a folder, a hub id, or a published file, of any family.

    A file takes `vq=` or `vae=`, its tokenizer or autoencoder, and `text_encoder`, `image_size`, `num_heads` and
    `ema` where needed; the other `options` are those of `from_pretrained`. Raises `VisarError`.
    """
    files = {key: options.pop(key) for key in FILES if key in options}
    return ImagePipeline.opened(name, files, options, PIPELINES)  # type: ignore[no-any-return]


def accelerate(model: Any, processor: Any = None) -> Any:
    """A pipeline around a loaded `model` of transformers, such as a Janus, and the `processor` of its prompts.

    For a `GlmImagePipeline` of diffusers it is that pipeline with codes from visar, called as before.

    The model stays yours: visar runs its layers with kernels of its own and leaves everything as it was, so what you do
    to its weights, and adapters and hooks in its layers, are in the images. Greedy tokens (`top_k=1`) are those of the
    model's own `generate`. Raises `VisarError` for a model of no known family.
    """
    return wrapped(model, processor, PIPELINES)


__all__ = ["ClassToImagePipeline", "ImageOutput", "ImagePipeline", "TextToImagePipeline", "accelerate", "load"]
