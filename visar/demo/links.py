"""A link to the settings of the page: written for a request, and checked like any input when it is opened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, urlencode

from visar.demo.models import DemoModel
from visar.demo.requests import TEXT, Limits, Request, checked, known_sampler, page_settings
from visar.errors import VisarError
from visar.samplers.parameters import Parameter, parameters_of

LONGEST = 4000  # characters
FIELDS = 64


def link_of(request: Request) -> str:
    """The query of a link, "?prompt=...": of a comparison, its two samplers; else the sampler with its parameters."""
    recipe = request.recipe()
    found: dict[str, Any] = {"model": request.model.name}
    found |= {"class": recipe.label} if recipe.prompt is None else {"prompt": recipe.prompt}
    if len(request.samplers) > 1:
        found |= {"first": request.samplers[0].name, "second": request.samplers[1].name}
    else:
        found |= {"images": request.images, "sampler": recipe.sampler}
        found |= {f"sampler.{name}": value for name, value in recipe.parameters.items()}
    return "?" + urlencode(found | recipe.settings)


def opened(query: Any, models: Mapping[str, DemoModel], limits: Limits) -> tuple[Request, bool] | None:
    """The request of a link, and whether it is a comparison; None for a query that has nothing of it.

    Raises `VisarError` for a link that asks for what there is not.
    """
    if not isinstance(query, str) or len(query) > LONGEST:
        raise VisarError(f"A link has at most {LONGEST} characters.")
    try:
        pairs = parse_qsl(query.removeprefix("?"), keep_blank_values=True, max_num_fields=FIELDS)
    except ValueError as error:
        raise VisarError("This link cannot be read.") from error
    given = {name: value for name, value in pairs if not name.startswith("__")}  # of Gradio: __theme
    if not given:
        return None
    if len(given) < len(pairs) and len({n for n, _ in pairs}) < len(pairs):
        raise VisarError("This link gives a setting twice.")
    name = given.pop("model", next(iter(models)))
    if name not in models:
        raise VisarError(f"There is no model {name[:TEXT]!r} here; there are {', '.join(models)}.")
    model = models[name]
    race = "first" in given or "second" in given
    if race:
        samplers = [given.pop("first", model.baseline), given.pop("second", model.default_sampler)]
        values: dict[str, Any] = {}
    else:
        samplers = [known_sampler(model, given.pop("sampler", model.default_sampler))]
        own = parameters_of(_default(model, samplers[0]))
        values = {n: _read(given.pop(f"sampler.{n}"), p) for n, p in own.items() if f"sampler.{n}" in given}
    settings: dict[str, Any] = {}
    for key, about in page_settings(model.tokens).items():
        text = given.pop(key, None)
        settings[key] = (0 if key == "seed" else model.default(key)) if text is None else text
        if text is not None and not about["choices"]:
            settings[key] = _number(text)
    label, images = _number(given.pop("class", "0")), _number(given.pop("images", "1"))
    prompt = given.pop("prompt", None)
    if given:
        raise VisarError(f"A link has no setting {next(iter(given))[:TEXT]!r}.")
    return checked(model, prompt, label, [(s, values) for s in samplers], images, settings, limits), race


def _default(model: DemoModel, sampler: str) -> Any:
    from visar.samplers import get_sampler

    return get_sampler(sampler, **model.parameters(sampler))


def _read(text: str, p: Parameter) -> Any:
    if p.kind is bool:
        return {"True": True, "False": False}.get(text, text)
    return text if p.kind is str else _number(text)


def _number(text: str) -> Any:
    """The number; text that is none stays what it is, which is then refused by name."""
    try:
        return int(text) if len(text) < 20 and text.lstrip("-").isdecimal() else float(text)
    except ValueError:
        return text
