"""visar: fast decoding of image autoregressive models, with proof of what each speed-up does to the image."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from visar.errors import VisarError
    from visar.families.registry import register_family
    from visar.generation.model import ImageModel
    from visar.params import SamplingParams
    from visar.pipelines import ClassToImagePipeline, TextToImagePipeline, accelerate, load
    from visar.samplers import SAMPLERS, Autoregressive, HeadSpeculation, Jacobi, SpeculativeJacobi

# Nothing heavy is imported before it is asked for.
_HOMES = {
    "ClassToImagePipeline": "visar.pipelines",
    "ImageModel": "visar.generation.model",
    "SamplingParams": "visar.params",
    "accelerate": "visar.pipelines",
    "load": "visar.pipelines",
    "register_family": "visar.families.registry",
    "TextToImagePipeline": "visar.pipelines",
    "SAMPLERS": "visar.samplers",
    "Autoregressive": "visar.samplers",
    "HeadSpeculation": "visar.samplers",
    "Jacobi": "visar.samplers",
    "SpeculativeJacobi": "visar.samplers",
    "VisarError": "visar.errors",
}

__all__ = [
    "SAMPLERS",
    "Autoregressive",
    "ClassToImagePipeline",
    "HeadSpeculation",
    "ImageModel",
    "Jacobi",
    "SamplingParams",
    "SpeculativeJacobi",
    "TextToImagePipeline",
    "VisarError",
    "__version__",
    "accelerate",
    "load",
    "register_family",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'visar' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
