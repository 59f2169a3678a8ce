"""What the demo lets a browser ask for: every bound has its sentence, and whatever is sent is answered with one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.stepped import served
from tests.pipelines.test_masked import masked_folder  # noqa: F401  (a fixture)
from visar.demo.models import DemoModel, named
from visar.demo.requests import SEEDS, Limits, Request, checked, page_settings
from visar.errors import VisarError
from visar.params import SamplingParams
from visar.pipelines import ClassToImagePipeline, TextToImagePipeline
from visar.samplers import SAMPLERS, get_sampler, samplers_for, spec_of
from visar.samplers.parameters import Parameter
from visar.serving.engine import Engine

LIMITS = Limits()
EVERY = {name: spec.options for name, spec in SAMPLERS.items() if spec.scan not in ("diagonal", "groups")}
DISCRETE, CONTINUOUS = (samplers_for(kind) for kind in ("discrete", "continuous"))
FREE = [(name, p) for name, found in EVERY.items() for p in found.values()]
ENDS = [(name, p) for name, p in FREE if p.kind in (int, float)]
SETTINGS: dict[str, Any] = dict(
    seed=0, guidance_scale=2.0, guidance_schedule="linear", temperature=1.0, top_k=0, top_p=1.0
)
JUNK: list[Any] = [
    math.nan, math.inf, -math.inf, 10**400, -(10**400), 1e308, True, "", "7", "\x00", "../../etc/passwd", [], [1], {},
    {"a": 1}, "x" * 10_000_000,
]  # fmt: skip


@pytest.fixture(scope="module")
def models(text_folder: Path, class_folder: Path, masked_folder: Path, drafters: list[Path]) -> Any:  # noqa: F811
    """By their families, with every drafter that there is."""
    text, masked = (TextToImagePipeline.from_pretrained(folder) for folder in (text_folder, masked_folder))
    for drafter in drafters:
        text.load_drafter(drafter)
    classes = ClassToImagePipeline.from_pretrained(class_folder)
    return named([("text", text), ("masked", masked), ("classes", classes)])


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = Engine(rows=1, pools=1)
    yield made
    assert made.close(drain=False, timeout=60)


def model_of(models: Any, sampler: str) -> DemoModel:
    found: DemoModel = models["masked" if sampler in CONTINUOUS else "text"]
    assert sampler in found.samplers
    return found


def is_one(sampler: Any, name: str) -> bool:
    return bool(sampler.name == name) and type(sampler) is type(spec_of(name).make())


def ask(model: DemoModel, *samplers: str, of: dict[str, Any] | None = None, **other: Any) -> Request:
    settings = SETTINGS | {name: other.pop(name) for name in SETTINGS if name in other}
    values: Any = dict(prompt="red heart", label=0, images=1) | other
    chosen = [(s, of or {}) for s in samplers or (model.baseline,)]
    return checked(model, samplers=chosen, settings=settings, limits=LIMITS, **values)


def sentence(*wanted: Any, **named: Any) -> str:
    with pytest.raises(VisarError) as error:
        ask(*wanted, **named)
    said = str(error.value)
    assert said.endswith((".", ".'")) and "\n" not in said and len(said) < 1500
    said.encode()  # it can be sent
    return said


# What everybody sets


@pytest.mark.parametrize(
    ("what", "low", "high", "said"),
    [
        ("images", 1, LIMITS.images, "The number of images must be from 1 to 4"),
        ("seed", 0, SEEDS - 1, "Seed must be from 0 to 2147483647"),
        ("guidance_scale", 0, 20, "Guidance scale must be from 0 to 20"),
        ("temperature", 0.05, 5, "Temperature must be from 0.05 to 5"),
        ("top_k", 0, 5000, "Top k must be from 0 to 5000"),
        ("top_p", 0.05, 1, "Top p must be from 0.05 to 1"),
    ],
)
def test_bounds(models: Any, what: str, low: float, high: float, said: str) -> None:
    for value in (low, high, float(low), float(high)):
        request = ask(models["text"], **{what: value})
        assert getattr(request.params if what in SETTINGS else request, what) == value
    for value in (low - 1, high + 1):
        assert sentence(models["text"], **{what: value}) == f"{said}, not {value:.10g}."
    for junk in (None, *JUNK):
        assert sentence(models["text"], **{what: junk}).startswith(said.partition(" from")[0])


def test_what_must_be_whole(models: Any) -> None:
    assert type(ask(models["text"], images=2.0).images) is int
    assert sentence(models["text"], images=1.5) == "The number of images must be a whole number, not 1.5."
    assert sentence(models["text"], seed=0.1) == "Seed must be a whole number, not 0.1."
    assert ask(models["text"], guidance_scale=1.5).params.guidance_scale == 1.5
    assert sentence(models["text"], guidance_scale=20.0000001) == "Guidance scale must be from 0 to 20, not 20.0000001."


def test_the_settings_are_what_was_asked_for(models: Any) -> None:
    request = ask(models["text"], images=3, seed=17, guidance_scale=1.5, temperature=0.5, top_k=7, top_p=0.9)
    wanted = SamplingParams(seed=17, guidance_scale=1.5, temperature=0.5, top_k=7, top_p=0.9)
    assert (request.images, request.params) == (3, wanted)
    masked = ask(models["masked"], guidance_schedule="linear", top_k=7).params
    assert (masked.guidance_schedule, masked.top_k) == ("linear", None)
    assert sentence(models["masked"], guidance_schedule="up").startswith("Guidance schedule must be constant or linear")


def test_the_page_has_a_box_for_every_setting_that_says_so(models: Any) -> None:
    boxes = {f.name for f in fields(SamplingParams) if f.metadata["box"]}
    assert set(page_settings()) == boxes == set(SETTINGS)
    assert set(page_settings("discrete")) | {"guidance_schedule"} == boxes
    assert all(m["slider"] or m["choices"] or name == "seed" for name, m in page_settings().items())


def test_the_settings_are_named(models: Any) -> None:
    request = ask(models["text"])
    assert (request.title, request.tokens, request.labels) == ("red heart", 25, ["ar"])


def test_prompts(models: Any) -> None:
    long = "a" * LIMITS.prompt
    assert ask(models["text"], prompt=f"  red\n\t heart{chr(0xA0)} ").condition == "red heart"
    assert ask(models["text"], prompt=long).condition == long
    assert sentence(models["text"], prompt=long + "a") == "The prompt has 301 characters; at most 300 are allowed."
    assert "10000000 characters" in sentence(models["text"], prompt="x" * 10_000_000)
    for empty in (None, "", "  \n\t ", " " * 1_000_000, 7, math.nan, True, ["red"], {"red": 1}):
        assert sentence(models["text"], prompt=empty) == "The prompt is empty; give at least one word."
    for odd in ("\ud800", "\0"):
        assert sentence(models["text"], prompt=f"red {odd}") == "The prompt has characters that are no text."


def test_classes(models: Any) -> None:
    model = models["classes"]
    assert model.classes == 7 and models["text"].classes == 0 == models["masked"].classes
    request = ask(model, label=6.0, prompt=None)
    assert request.condition == 6 and request.title == "class 6"
    for label in (-1, 7):
        assert sentence(model, label=label) == f"The class must be from 0 to 6, not {label}."
    assert sentence(model, label=0.5) == "The class must be a whole number, not 0.5."
    for junk in (None, *JUNK):
        assert sentence(model, label=junk).startswith("The class must be")
    assert ask(models["text"], label=None).condition == "red heart"  # it is not read then


# Samplers


@pytest.mark.parametrize("name", [None, *JUNK, "Ar", "ar ", "mar", "scd:window=4", "ar\x00"])
def test_samplers_that_there_are_not(models: Any, name: Any) -> None:
    assert sentence(models["text"], name).startswith("Unknown sampler of text")


def test_samplers_whose_drafter_is_not_there(text_pipe: Any, models: Any) -> None:
    bare = DemoModel("bare", text_pipe.image_model)
    assert bare.samplers == [name for name, spec in DISCRETE.items() if not spec.drafter]
    assert set(models["text"].samplers) == set(DISCRETE) and set(models["masked"].samplers) == set(CONTINUOUS)
    assert "Unknown sampler of bare 'eagle'" in sentence(bare, "eagle")
    assert sentence(bare, "ar", "medusa").startswith("Unknown sampler of bare 'medusa'")  # nor the second of two


@pytest.mark.parametrize(("name", "p"), ENDS, ids=[f"{n}-{p.name}" for n, p in ENDS])
def test_numbers_of_samplers(models: Any, name: str, p: Parameter) -> None:
    model = model_of(models, name)
    assert p.low is not None and p.high is not None
    for value in (p.low, p.high):
        try:
            (made,) = ask(model, name, of={p.name: value}).samplers
        except VisarError as error:  # a combination of parameters that does not go
            assert (p.name in str(error) or "tree" in str(error)) and str(error).endswith(".")
        else:
            assert getattr(made, p.name) == value and type(getattr(made, p.name)) is p.kind and is_one(made, name)
    bounds = f"from {p.low:g} to {p.high:g}"
    for value in (p.low - 1, p.high + 1):
        assert sentence(model, name, of={p.name: value}).startswith(f"{p.name} must be {bounds}, not ")
    for junk in JUNK:
        assert sentence(model, name, of={p.name: junk}).startswith(f"{p.name} must be ")
    if p.kind is int:
        assert sentence(model, name, of={p.name: p.low + 0.5}).startswith(f"{p.name} must be a whole number, not ")


@pytest.mark.parametrize(
    ("name", "p"), [(n, p) for n, p in FREE if p.kind in (str, bool)], ids=lambda v: getattr(v, "name", v)
)
def test_choices_switches_and_texts_of_samplers(models: Any, name: str, p: Parameter) -> None:
    model = model_of(models, name)
    for value in p.choices or ((True, False) if p.kind is bool else (p.default,)):
        (made,) = ask(model, name, of={p.name: value}).samplers
        assert getattr(made, p.name) == value and is_one(made, name)
    junk = [v for v in (*JUNK, 0, 1, "true", "4x", "mc", "999999999x9", "x" * 401, "1x" * 199 + "1")]
    for value in junk:
        if (p.kind is bool and value is True) or (p.name == "tree" and value == "7"):
            continue  # which they may be
        said = sentence(model, name, of={p.name: value})
        assert p.name in said and (not p.choices or f"must be {', '.join(p.choices)}, not" in said)


@pytest.mark.parametrize("name", EVERY)
def test_fixed_and_foreign_parameters_are_left_out(models: Any, name: str) -> None:
    model = model_of(models, name)
    (plain,) = ask(model, name).samplers
    others = {p.name: 3 for found in EVERY.values() for p in found.values() if p.name not in EVERY[name]}
    fixed = {"coupling": "gumbel", "children": "drawn", "drafter": "model", "factor": False, "grid": 1}
    empty: dict[str, Any] = {p.name: None for p in EVERY[name].values()}
    for values in (others | {"nonsense": [1], "__class__": "x", "step": 1}, fixed, empty):
        assert ask(model, name, of=values).samplers == (plain,)
    assert is_one(plain, name) and plain == get_sampler(name, **model.parameters(name))


def test_no_more_passes_than_tokens_by_default(models: Any) -> None:
    assert ask(models["masked"], "mar").samplers[0].steps == 9 == models["masked"].model.family.layout.length
    assert ask(models["masked"], "mar", of={"steps": 4}).samplers[0].steps == 4


@pytest.mark.parametrize("name", EVERY)
def test_what_passes_the_check_is_drawn_or_refused_in_a_sentence(models: Any, name: str, engine: Engine) -> None:
    """The low end of everything, the high end of everything, and the defaults, as the engine serves them."""
    model = model_of(models, name)
    free = [p for p in EVERY[name].values() if p.low is not None]
    slow = {"head_steps": 12, "last_head_steps": 5, "latest": 400, "steps": 5}  # at their ends
    low, high = ({p.name: slow.get(p.name, getattr(p, end)) for p in free} for end in ("low", "high"))
    drawn = 0
    for of, guidance, temperature in ((low, 0, 0.05), (high, 20, 5), (slow, 2.0, 1.0)):
        if of is slow and drawn:
            continue  # not all ends go together; something must
        try:
            request = ask(model, name, of=of, guidance_scale=guidance, temperature=temperature)
            ((run,),) = [served(engine, request)]
        except VisarError as error:
            assert str(error).endswith(".")
        else:
            drawn += 1
            assert run.done and is_one(request.samplers[0], name)
    assert drawn


# Several samplers, and models


def test_labels_tell_samplers_apart(models: Any) -> None:
    def labels(*samplers: tuple[str, dict[str, Any]]) -> list[str]:
        return checked(models["text"], "red", None, samplers, 1, SETTINGS, LIMITS).labels

    assert labels(("ar", {}), ("scd", {})) == ["ar", "scd"]
    assert labels(("scd", {"window": 4}), ("scd", {"window": 8})) == ["scd, window 4", "scd, window 8"]
    assert labels(("scd", {}), ("scd", {})) == ["scd", "scd, again"]
    both = labels(("scd", {"window": 4, "init": "left"}), ("scd", {"window": 4, "init": "above"}))
    assert both == ["scd, init left", "scd, init above"]


def test_models_by_name(text_pipe: Any, class_pipe: Any) -> None:
    found = named([("icons", text_pipe), ("/models/of/mine", class_pipe), ("elsewhere/mine", text_pipe)])
    assert list(found) == ["icons", "mine", "mine-2"] and found["mine"].model is class_pipe.image_model
    assert found["icons"].default_sampler == "scd" and found["icons"].baseline == "ar"
    assert found["icons"].default("guidance_scale") == 2.0 and found["mine-2"].default("temperature") == 1.0


def test_the_masked_models_defaults(models: Any) -> None:
    model = models["masked"]
    assert (model.default_sampler, model.baseline, model.default("guidance_scale")) == ("mar-headspec", "mar", 2.0)
