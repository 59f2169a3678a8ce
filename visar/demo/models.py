"""The models of a demo, loaded once at its start; a browser can name these only, not a path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from visar.generation.model import ImageModel
from visar.params import SamplingParams
from visar.samplers import default_sampler, spec_of
from visar.serving import replica


@dataclass(frozen=True)
class DemoModel:
    """A loaded model, by the name that the page shows."""

    name: str
    model: ImageModel

    @property
    def classes(self) -> int:
        """The number of classes; 0 for a model of prompts."""
        return self.model.family.classes

    @property
    def samplers(self) -> list[str]:
        return self.model.usable_samplers()

    @property
    def default_sampler(self) -> str:
        return default_sampler(self.tokens, self.model.family.scan)

    @property
    def baseline(self) -> str:
        """Plain decoding, the reference of comparisons."""
        return next((name for name in ("ar", "mar") if name in self.samplers), self.default_sampler)

    @property
    def tokens(self) -> str:
        """The kind of its tokens."""
        return self.model.family.tokens

    def default(self, setting: str) -> Any:
        """The model's default of a setting of `SamplingParams`."""
        return getattr(SamplingParams().resolved(self.model.family.defaults), setting)

    def parameters(self, sampler: str) -> dict[str, Any]:
        """A sampler's defaults for this model, with at most as many passes as tokens."""
        found = spec_of(sampler).parameters()
        if "steps" in found:
            found["steps"] = min(found["steps"], self.model.family.layout.length)
        return found


def named(models: Iterable[tuple[str, Any]]) -> Mapping[str, DemoModel]:
    """The models by their names (`visar.serving.replica.named`)."""
    found = replica.named((given, ImageModel.of(model)) for given, model in models)
    return {name: DemoModel(name, model) for name, model in found.items()}
