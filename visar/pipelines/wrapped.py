"""`visar.accelerate`: a pipeline around a model that another library has loaded."""

from __future__ import annotations

from typing import Any

from visar.errors import VisarError
from visar.families.registry import families
from visar.generation.model import ImageModel
from visar.pipelines.base import ImagePipeline


def wrapped(model: Any, processor: Any, kinds: dict[str, type[ImagePipeline]]) -> Any:
    """The pipeline of the family that knows the model. Raises `VisarError` if none does."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # a PEFT model, whose adapters are within
    for family in reversed(list(families().values())):
        if family.wraps(model):
            made = ImageModel(family.around(model, processor))
            return made.family.in_place_of(model, kinds[made.family.condition](image_model=made))
    raise VisarError(
        f"visar knows no images of a {type(model).__name__}: accelerate takes loaded models of the families in "
        "docs/families, and docs/own-causal-model.md says how to bring another."
    )
