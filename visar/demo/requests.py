"""Requests of visitors, and their validation before they are queued."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

from visar.demo.models import DemoModel
from visar.errors import VisarError, unknown
from visar.params import SamplingParams
from visar.recipe import Recipe
from visar.samplers import get_sampler, values_of
from visar.samplers.parameters import parameters_of

SEEDS = 2**31  # fewer than allowed elsewhere: every browser shows these exactly
TEXT = 400  # characters of a sampler's parameter


@dataclass(frozen=True)
class Limits:
    """Limits: images and characters of a request, seconds until its end, and what the server keeps of its visitors."""

    images: int = 4
    prompt: int = 300
    seconds: float = 600
    rows: int = 8  # images of a sampler that are decoded at once
    waiting: int = 16  # images in line
    per_address: int = 1  # requests of one network address
    sessions: int = 256  # browsers that are remembered, 0.3 MB each
    idle: float = 3600  # seconds until a browser that does nothing is forgotten
    unread: int = 100  # frames for a browser that reads none


@dataclass(frozen=True)
class Request:
    """Requested images, `images` with each of `samplers`; made by `checked` only."""

    model: DemoModel
    condition: str | int
    samplers: tuple[Any, ...]
    images: int
    params: SamplingParams

    @property
    def seed(self) -> int:
        return cast(int, self.params.seed)

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        return self.model.model.family.layout.length

    @property
    def labels(self) -> list[str]:
        """The samplers' names, with differing parameters if two have one name."""
        names = [s.name for s in self.samplers]
        if len(set(names)) == len(names):
            return names
        values = [values_of(s) for s in self.samplers]
        differ = [k for k in values[0] if len({v.get(k) for v in values}) > 1]
        found = [", ".join([n, *(f"{k} {v[k]}" for k in differ)]) for n, v in zip(names, values, strict=True)]
        return found if differ else [found[0], *(f"{n}, again" for n in found[1:])]

    @property
    def title(self) -> str:
        """The condition, in words."""
        return f"class {self.condition}" if isinstance(self.condition, int) else self.condition

    def recipe(self, number: int = 0, image: int = 0) -> Recipe:
        """How an image of a sampler is made again; settings that are the model's own are left out."""
        named = {"label" if isinstance(self.condition, int) else "prompt": self.condition}
        given = {name: getattr(self.params, name) for name in page_settings(self.model.tokens)}
        settings = {n: v for n, v in given.items() if n == "seed" or v != self.model.default(n)}
        dtype = str(self.model.model.dtype).removeprefix("torch.")
        values: Any = {"model": self.model.name, "image": image, "settings": settings, "dtype": dtype, **named}
        return Recipe.of(self.samplers[number], **values)


def page_settings(tokens: str | None = None) -> dict[str, Any]:
    """The metadata of the settings with boxes on the page, by name; all, or those for one kind of `tokens`."""
    found = {f.name: f.metadata for f in fields(SamplingParams) if f.metadata["box"]}
    return {name: m for name, m in found.items() if tokens is None or m["only"] in ("", tokens)}


def label_of(setting: str) -> str:
    """The label of a setting."""
    return setting[:1].upper() + setting[1:].replace("_", " ")


def checked(
    model: DemoModel,
    prompt: str | None,
    label: float | None,
    samplers: Sequence[tuple[str, Mapping[str, Any]]],
    images: float | None,
    settings: Mapping[str, Any],
    limits: Limits,
) -> Request:
    """The request. Raises `VisarError` with the allowed values.

    `samplers`: names with the values of their parameters. Parameters that a sampler does not have, and `settings` that
    the model does not have, are ignored. A model of classes uses `label`, others use `prompt`.
    """
    chosen = tuple(_sampler(model, name, values) for name, values in samplers)
    count = whole("The number of images", images, 1, limits.images)
    given = {name: _setting(name, about, settings.get(name)) for name, about in page_settings(model.tokens).items()}
    condition = whole("The class", label, 0, model.classes - 1) if model.classes else _text(prompt, limits)
    return Request(model, condition, chosen, count, SamplingParams(**given))


def _setting(name: str, about: Mapping[str, Any], value: Any) -> Any:
    what = label_of(name)
    if about["choices"]:
        if value not in about["choices"]:
            raise VisarError(f"{what} must be {' or '.join(about['choices'])}, not {str(value)[:TEXT]!r}.")
        return value
    if about["slider"] is None:
        return whole(what, value, 0, SEEDS - 1)
    low, high, step = about["slider"]
    return (whole if step == 1 else _number)(what, value, low, high)


def _text(prompt: Any, limits: Limits) -> str:
    """The prompt with single spaces between its words."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise VisarError("The prompt is empty; give at least one word.")
    text = " ".join(prompt.split())
    if len(text) > limits.prompt:
        raise VisarError(f"The prompt has {len(text)} characters; at most {limits.prompt} are allowed.")
    # Lone surrogates cannot be encoded, and no command takes a zero byte.
    if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text):
        raise VisarError("The prompt has characters that are no text.")
    return text


def known_sampler(model: DemoModel, name: Any) -> str:
    """The name, if the model has this sampler. Raises `VisarError`; no place of a file is one."""
    if name not in model.samplers:
        raise unknown(f"sampler of {model.name}", str(name)[:TEXT], model.samplers)
    return str(name)


def _sampler(model: DemoModel, name: Any, values: Mapping[str, Any]) -> Any:
    made = get_sampler(known_sampler(model, name), **model.parameters(name))
    given: dict[str, Any] = {}
    for p in parameters_of(made).values():
        if (value := values.get(p.name)) is None:
            continue
        if p.kind in (int, float) and p.low is not None and p.high is not None:
            value = (whole if p.kind is int else _number)(p.name, value, p.low, p.high)
        elif not isinstance(value, p.kind) or (p.choices and value not in p.choices) or len(str(value)) > TEXT:
            raise VisarError(f"{p.name} must be {p.range}, not {str(value)[:TEXT]!r}.")
        given[p.name] = value
    return get_sampler(made, **given)


def _number(what: str, value: Any, low: float, high: float) -> float:
    """The number, within bounds. Raises `VisarError`; a browser may send anything, and None for an empty box."""
    allowed = f"from {_shown(low)} to {_shown(high)}"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise VisarError(f"{what} must be a number {allowed}.")
    if not low <= value <= high:  # before the conversion to float, which can overflow
        raise VisarError(f"{what} must be {allowed}, not {_shown(value)}.")
    return float(value)


def whole(what: str, value: Any, low: float, high: float) -> int:
    number = _number(what, value, low, high)
    if number != int(number):
        raise VisarError(f"{what} must be a whole number, not {_shown(number)}.")
    return int(number)


def _shown(value: float) -> str:
    """The number with all digits, so that a bound and a value just beyond it look different."""
    if abs(value) >= 1e15:
        return "a number so large" if value > 0 else "one so far below"
    return str(int(value)) if value == int(value) else str(value)
