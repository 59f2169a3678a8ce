"""The boxes that say what is drawn: model, prompt or class, images, seed, guidance, temperature."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from visar.demo.models import DemoModel
from visar.demo.requests import COLDEST, GUIDANCE, SEEDS, TEMPERATURE, Limits, Request, checked
from visar.errors import VisarError

PROMPTS = ["a red heart, 3d", "a lion, noto", "a green apple, flat", "a sailboat, 3d"]


class Conditions:
    """Made inside the layout at work, what is drawn first and `chances` wherever they are to stand.

    The first model is chosen.
    """

    def __init__(self, models: Mapping[str, DemoModel], limits: Limits):
        self.models = models
        first = next(iter(models.values()))
        self.model = gr.Dropdown(list(models), value=first.name, label="Model", visible=len(models) > 1)
        self.prompt = gr.Textbox(
            value=PROMPTS[0], label="Prompt", max_lines=3, max_length=limits.prompt, visible=not first.classes,
            elem_classes="visar-prompt",
        )  # fmt: skip
        self.examples = gr.Examples(PROMPTS, self.prompt, label="Try", visible=not first.classes).dataset
        self.label = gr.Number(0, label=_class_label(first), visible=bool(first.classes))

    def chances(self, limits: Limits) -> None:
        """The boxes for images, seed, guidance and temperature."""
        first = next(iter(self.models.values()))
        with gr.Row():
            self.images = gr.Slider(1, limits.images, value=1, step=1, label="Images", visible=limits.images > 1)
            with gr.Column(min_width=140):
                self.seed = gr.Number(0, label="Seed", elem_classes="visar-seed")
                dice = gr.Button("Another seed", size="sm")
        self.guidance = gr.Slider(0, GUIDANCE, value=first.guidance, step=0.1, label="Guidance", info="1 is none.")
        self.temperature = gr.Slider(
            COLDEST,
            TEMPERATURE,
            value=first.temperature,
            step=0.05,
            label="Temperature",
            info="1 is the model as it is.",
        )  # fmt: skip
        dice.click(lambda: secrets.randbelow(SEEDS), None, self.seed, queue=False, api_visibility="private")

    @property
    def components(self) -> list[Any]:
        return [self.model, self.prompt, self.label, self.images, self.seed, self.guidance, self.temperature]

    @property
    def dependent(self) -> list[Any]:
        """Those that depend on the model."""
        return [self.prompt, self.examples, self.label, self.guidance, self.temperature]

    def of_model(self, name: str) -> list[Any]:
        """Updates of `dependent` when this model was chosen."""
        model = self.models[name]
        return [
            gr.update(visible=not model.classes),
            gr.update(visible=not model.classes),
            gr.update(visible=bool(model.classes), label=_class_label(model)),
            model.guidance,
            model.temperature,
        ]

    def request(self, values: Sequence[Any], samplers: list[tuple[str, dict[str, Any]]], limits: Limits) -> Request:
        """What the values of `components` ask for; a `VisarError` where it is not allowed."""
        name, prompt, label, images, seed, guidance, temperature = values
        if not isinstance(name, str) or name not in self.models:
            raise VisarError(f"There is no model {name!r} here; there are {', '.join(self.models)}.")
        return checked(
            self.models[name], prompt, label, samplers, images, seed, guidance, temperature, limits
        )  # fmt: skip


def _class_label(model: DemoModel) -> str:
    return f"Class, 0 to {model.classes - 1}" if model.classes else "Class"
