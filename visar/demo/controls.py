"""A sampler's dropdown and its parameters' boxes, made from its fields.

Each parameter of any sampler in the demo has one box; those of the chosen sampler are shown, with its defaults, ranges
and help.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import gradio as gr

from visar.demo import view, words
from visar.demo.models import DemoModel
from visar.demo.requests import known_sampler
from visar.samplers import get_sampler
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


class SamplerControls:
    """The components of one choice of a sampler, in the current layout; `add_parameters` adds the boxes.

    `chosen` is a sampler of the first model.
    """

    def __init__(self, models: Mapping[str, DemoModel], label: str, chosen: str):
        self.models, self.chosen = models, chosen
        first = next(iter(models.values()))
        self.sampler = gr.Dropdown(choices_of(first), value=chosen, label=label, elem_classes="visar-sampler")
        self.line = gr.HTML(view.explained(chosen))
        self.boxes: dict[str, Any] = {}

    def add_parameters(self) -> None:
        own = shown_parameters(next(iter(self.models.values())), self.chosen)
        every: dict[str, Parameter] = {}
        for model in self.models.values():
            for name in model.samplers:
                every |= {k: p for k, p in shown_parameters(model, name).items() if k not in every}
        with gr.Row(elem_classes="visar-parameters"):
            self.boxes |= {name: _box_of(own.get(name, p), name in own) for name, p in every.items()}

    @property
    def components(self) -> list[Any]:
        """In the order of the values that `named` takes."""
        return [self.sampler, *self.boxes.values()]

    @property
    def outputs(self) -> list[Any]:
        """The components that `of_model` updates; those after the first are updated by `choose`."""
        return [self.sampler, self.line, *self.boxes.values()]

    def named(self, values: Sequence[Any]) -> tuple[str, dict[str, Any]]:
        """The sampler's name, and the values of all boxes by name."""
        name, *rest = values
        return name, dict(zip(self.boxes, rest, strict=True))

    def choose(self, model: DemoModel, sampler: Any, values: Mapping[str, Any] = MappingProxyType({})) -> list[Any]:
        """Updates for a chosen sampler, and `values` of its parameters. Raises `VisarError` for one that the model does
        not have."""
        own = shown_parameters(model, known_sampler(model, sampler))
        own |= {name: replace(own[name], default=value) for name, value in values.items() if name in own}
        boxes = [_box_of(own[name], True) if name in own else gr.update(visible=False) for name in self.boxes]
        return [view.explained(sampler), *boxes]

    def of_model(self, model: DemoModel, chosen: str, values: Mapping[str, Any] = MappingProxyType({})) -> list[Any]:
        """Updates for a chosen model."""
        return [gr.update(choices=choices_of(model), value=chosen), *self.choose(model, chosen, values)]


def choices_of(model: DemoModel) -> list[tuple[str, str]]:
    """The samplers of a model in their groups, each with what kind it is."""
    kinds = ("exact", "exact, with a drafter", "relaxed")
    return [(f"{n} · {kinds[words.group_of(n)]}", n) for n in words.ordered(model.samplers)]
