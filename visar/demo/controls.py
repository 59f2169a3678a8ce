"""A sampler's dropdown and its parameters' boxes, made from its fields.

Each parameter of any sampler in the demo has one box; those of the chosen sampler are shown, with its defaults, ranges
and help.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from visar.demo import view
from visar.demo.models import DemoModel
from visar.demo.requests import known_sampler
from visar.samplers import get_sampler, spec_of
from visar.samplers.parameters import Parameter, parameters_of


def shown_parameters(model: DemoModel, sampler: str) -> dict[str, Parameter]:
    """The parameters of a sampler, with its defaults for this model."""
    return parameters_of(get_sampler(sampler, **model.parameters(sampler)))


def _box_of(p: Parameter, visible: bool) -> Any:
    """A component for a parameter, which also serves as an update."""
    info = f"{p.help[:1].upper()}{p.help[1:]}"
    common: dict[str, Any] = dict(
        value=p.default,
        label=p.name,
        info=info,
        visible=visible,
        min_width=210,
        elem_classes=f"visar-parameter-{p.name}",
    )
    if p.choices:
        return gr.Dropdown(list(p.choices), **common)
    if p.kind is bool:
        return gr.Checkbox(**common)
    if p.kind is str:
        return gr.Textbox(max_lines=1, **common)
    assert p.low is not None and p.high is not None
    return gr.Slider(p.low, p.high, step=1 if p.kind is int else 0.01, **common)


@dataclass(frozen=True)
class SamplerControls:
    """The components of one choice of a sampler."""

    sampler: Any
    exactness: Any
    boxes: dict[str, Any]

    @staticmethod
    def build(models: Mapping[str, DemoModel], label: str, chosen: str) -> SamplerControls:
        """The components, in the current layout; `chosen` is a sampler of the first model."""
        first = next(iter(models.values()))
        sampler = gr.Dropdown(choices_of(first), value=chosen, label=label, elem_classes="visar-sampler")
        exactness = gr.HTML(exactness_of(chosen))
        own = shown_parameters(first, chosen)
        every: dict[str, Parameter] = {}
        for model in models.values():
            for name in model.samplers:
                every |= {k: p for k, p in shown_parameters(model, name).items() if k not in every}
        with gr.Row():
            boxes = {name: _box_of(own.get(name, p), name in own) for name, p in every.items()}
        return SamplerControls(sampler, exactness, boxes)

    @property
    def components(self) -> list[Any]:
        """In the order of the values that `named` takes."""
        return [self.sampler, *self.boxes.values()]

    @property
    def outputs(self) -> list[Any]:
        """The components that `of_model` updates; those after the first are updated by `choose`."""
        return [self.sampler, self.exactness, *self.boxes.values()]

    def named(self, values: Sequence[Any]) -> tuple[str, dict[str, Any]]:
        """The sampler's name, and the values of all boxes by name."""
        name, *rest = values
        return name, dict(zip(self.boxes, rest, strict=True))

    def choose(self, model: DemoModel, sampler: Any) -> list[Any]:
        """Updates for a chosen sampler. Raises `VisarError` for one that the model does not have."""
        own = shown_parameters(model, known_sampler(model, sampler))
        boxes = [_box_of(own[name], True) if name in own else gr.update(visible=False) for name in self.boxes]
        return [exactness_of(sampler), *boxes]

    def of_model(self, model: DemoModel, chosen: str) -> list[Any]:
        """Updates for a chosen model."""
        return [gr.update(choices=choices_of(model), value=chosen), *self.choose(model, chosen)]


def choices_of(model: DemoModel) -> list[tuple[str, str]]:
    """The samplers of a model, labelled with whether they are exact."""
    return [(name if spec_of(name).exact else f"{name} ({_short(name)})", name) for name in model.samplers]


def _short(name: str) -> str:
    return spec_of(name).exactness.partition(";")[0]


def exactness_of(sampler: str) -> str:
    spec = spec_of(sampler)
    return f'<p class="visar-exactness">{view.exactness(spec.name, spec.exactness)}<br><small>{spec.paper}</small></p>'
