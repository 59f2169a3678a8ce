"""The boxes of a request: model, prompt or class, images, and a box for each setting of `SamplingParams`."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from visar.demo.models import DemoModel
from visar.demo.requests import SEEDS, TEXT, Limits, Request, checked, label_of, page_settings, whole
from visar.errors import VisarError

PROMPTS = ["a red heart, 3d", "a lion, noto", "a green apple, flat", "a sailboat, 3d"]


class Conditions:
    """Boxes for model and prompt in the current layout; `add_settings` adds the others. The first model is chosen."""

    def __init__(self, models: Mapping[str, DemoModel], limits: Limits):
        self.models = models
        first = next(iter(models.values()))
        self.model = gr.Dropdown(list(models), value=first.name, label="Model", visible=len(models) > 1)
        self.prompt = gr.Textbox(
            value=PROMPTS[0],
            label="Prompt",
            max_lines=3,
            max_length=limits.prompt,
            visible=not first.classes,
            elem_classes="visar-prompt",
        )
        self.examples = gr.Dataset(
            components=[self.prompt],
            samples=[[p] for p in PROMPTS],
            type="index",
            label="Try",
            visible=not first.classes,
        )
        self.label = gr.Number(0, label=_class_label(first), visible=bool(first.classes))

    def add_settings(self, limits: Limits) -> None:
        """The boxes for images and settings."""
        first = next(iter(self.models.values()))
        self.settings: dict[str, Any] = {}
        with gr.Row():
            self.images = gr.Slider(1, limits.images, value=1, step=1, label="Images", visible=limits.images > 1)
            with gr.Column(min_width=140):
                self.settings["seed"] = gr.Number(0, label=label_of("seed"), elem_classes="visar-seed")
                self.dice = gr.Button("Another seed", size="sm")
        for name, about in page_settings().items():
            if name not in self.settings:
                self.settings[name] = _box(name, about, first)

    @property
    def components(self) -> list[Any]:
        return [self.model, self.prompt, self.label, self.images, *self.settings.values()]

    @property
    def dependent(self) -> list[Any]:
        """The components that depend on the model."""
        return [self.prompt, self.examples, self.label, *(b for name, b in self.settings.items() if name != "seed")]

    def known(self, name: Any) -> DemoModel:
        """The model of this name. Raises `VisarError`; a browser may send anything."""
        if not isinstance(name, str) or name not in self.models:
            raise VisarError(f"There is no model {str(name)[:TEXT]!r} here; there are {', '.join(self.models)}.")
        return self.models[name]

    def example(self, number: Any) -> list[Any]:
        """The prompt of a number of the examples. Raises `VisarError`."""
        return [PROMPTS[whole("The example", number, 0, len(PROMPTS) - 1)]]

    def another_seed(self) -> list[Any]:
        return [secrets.randbelow(SEEDS)]

    def of_model(self, name: Any) -> list[Any]:
        """Updates of `dependent` for a chosen model."""
        model, about = self.known(name), page_settings()
        return [
            gr.update(visible=not model.classes),
            gr.update(visible=not model.classes),
            gr.update(visible=bool(model.classes), label=_class_label(model)),
            *(gr.update(**_shown(s, about[s], model)) for s in self.settings if s != "seed"),
        ]

    def request(self, values: Sequence[Any], samplers: list[tuple[str, dict[str, Any]]], limits: Limits) -> Request:
        """The request for the values of `components`. Raises `VisarError` if it is not allowed."""
        name, prompt, label, images, *rest = values
        settings = dict(zip(self.settings, rest, strict=True))
        return checked(self.known(name), prompt, label, samplers, images, settings, limits)


def _shown(name: str, about: Mapping[str, Any], model: DemoModel) -> dict[str, Any]:
    """A setting's value for a model, and whether the model has it."""
    has = about["only"] in ("", model.tokens)
    unused = about["choices"][0] if about["choices"] else about["slider"][0]
    return {"value": model.default(name) if has else unused, "visible": has}


def _box(name: str, about: Mapping[str, Any], model: DemoModel) -> Any:
    info = f"{about['help'][:1].upper()}{about['help'][1:]}."
    common: dict[str, Any] = {"label": label_of(name), "info": info, **_shown(name, about, model)}
    if about["choices"]:
        return gr.Dropdown(list(about["choices"]), **common)
    low, high, step = about["slider"]
    return gr.Slider(low, high, step=step, **common)


def _class_label(model: DemoModel) -> str:
    return f"Class, 0 to {model.classes - 1}" if model.classes else "Class"
