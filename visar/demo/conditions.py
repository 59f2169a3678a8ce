"""The boxes of a request: prompt or class, model, images, seed, and a box for each setting of `SamplingParams`."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from visar.demo import view
from visar.demo.models import DemoModel
from visar.demo.requests import SEEDS, TEXT, Limits, Request, checked, label_of, page_settings
from visar.errors import VisarError
from visar.families.catalogue import is_embedded


class Conditions:
    """Boxes in the current layout, by `add_settings` and `add_advanced` the others. The first model is chosen."""

    def __init__(self, models: Mapping[str, DemoModel], limits: Limits):
        self.models, self.limits = models, limits
        first = next(iter(models.values()))
        self.prompt = gr.Textbox(
            value=view.EXAMPLES[0], label="Prompt", max_lines=1, max_length=limits.prompt, visible=not first.classes,
            elem_id="prompt",
        )  # fmt: skip
        self.label = gr.Number(0, label=_class_label(first), visible=bool(first.classes))
        self.examples = gr.HTML(view.examples(), visible=_has_examples(first), elem_id="examples")

    def add_settings(self) -> None:
        """Model, images and seed."""
        names = list(self.models)
        self.model = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)
        self.images = gr.Slider(1, self.limits.images, value=1, step=1, label="Images", visible=self.limits.images > 1)
        with gr.Row():
            self.random = gr.Checkbox(True, label="Random seed", min_width=120)
            seed = gr.Number(0, label=label_of("seed"), elem_id="seed", min_width=120)
        seed.input(None, None, self.random, js="() => false", queue=False)  # who writes a seed wants it
        self.settings: dict[str, Any] = {"seed": seed}

    def add_advanced(self) -> None:
        """The other settings."""
        first = next(iter(self.models.values()))
        for name, about in page_settings().items():
            if name != "seed":
                self.settings[name] = _box(name, about, first)

    @property
    def components(self) -> list[Any]:
        return [self.model, self.prompt, self.label, self.images, self.random, *self.settings.values()]

    @property
    def dependent(self) -> list[Any]:
        """The components that depend on the model."""
        return [self.prompt, self.examples, self.label, *(b for name, b in self.settings.items() if name != "seed")]

    def known(self, name: Any) -> DemoModel:
        """The model of this name. Raises `VisarError`; a browser may send anything."""
        if not isinstance(name, str) or name not in self.models:
            raise VisarError(f"There is no model {str(name)[:TEXT]!r} here; there are {', '.join(self.models)}.")
        return self.models[name]

    def of_model(self, name: Any) -> list[Any]:
        """Updates of `dependent` for a chosen model."""
        model, about = self.known(name), page_settings()
        return [
            gr.update(visible=not model.classes),
            gr.update(visible=_has_examples(model)),
            gr.update(visible=bool(model.classes), label=_class_label(model)),
            *(gr.update(**_shown(s, about[s], model)) for s in self.settings if s != "seed"),
        ]

    def of_request(self, request: Request) -> list[Any]:
        """Updates of `components` for a request of a link."""
        given: dict[str, Any] = {"value": request.condition}
        settings = page_settings(request.model.tokens)
        return [
            request.model.name,
            gr.update() if request.model.classes else gr.update(**given),
            gr.update(**given) if request.model.classes else gr.update(),
            request.images,
            False,
            *(gr.update(value=getattr(request.params, n)) if n in settings else gr.update() for n in self.settings),
        ]

    def request(self, values: Sequence[Any], samplers: list[tuple[str, dict[str, Any]]], images: bool) -> Request:
        """The request for the values of `components`, of one image unless `images`.

        Raises `VisarError` if it is not allowed.
        """
        name, prompt, label, count, random, *rest = values
        settings = dict(zip(self.settings, rest, strict=True))
        if not isinstance(random, bool):
            raise VisarError("Random seed must be true or false.")
        if random:
            settings["seed"] = secrets.randbelow(SEEDS)
        return checked(self.known(name), prompt, label, samplers, count if images else 1, settings, self.limits)


def _has_examples(model: DemoModel) -> bool:
    return not model.classes and is_embedded(model.name)


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
