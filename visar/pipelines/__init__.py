"""Pipelines in the manner of diffusers: from a prompt or a class to images."""

from visar.pipelines.base import ImageOutput
from visar.pipelines.class_to_image import ClassToImagePipeline
from visar.pipelines.masked import MaskedClassToImagePipeline, MaskedTextToImagePipeline
from visar.pipelines.text_to_image import TextToImagePipeline

__all__ = [
    "ClassToImagePipeline",
    "ImageOutput",
    "MaskedClassToImagePipeline",
    "MaskedTextToImagePipeline",
    "TextToImagePipeline",
]
