"""What samplers say of their parameters, which forms and tables are built from."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest

from visar.cli import main
from visar.errors import VisarError
from visar.samplers import CONTINUOUS, SAMPLERS, get_sampler, spec_of
from visar.samplers.parameters import Parameter, parameters_of

NAMES = [*SAMPLERS, *CONTINUOUS]


def free(name: str) -> list[Parameter]:
    return [p for p in parameters_of(spec_of(name).make()).values() if not p.fixed]


@pytest.mark.parametrize("name", NAMES)
def test_every_field_says_what_it_is(name: str) -> None:
    made = spec_of(name).make()
    found = parameters_of(made)
    assert list(found) == [f.name for f in fields(made)]
    for p in found.values():
        assert p.help and p.default == getattr(made, p.name) and isinstance(p.default, p.kind)
        if not p.fixed and p.kind in (int, float):
            assert p.low is not None and p.high is not None and p.low <= p.default <= p.high
        if p.choices:
            assert p.default in p.choices


@pytest.mark.parametrize("name", NAMES)
def test_what_is_offered_leaves_the_sampler_what_it_is(name: str) -> None:
    """Every choice, and the lower end of every range, makes a sampler of the same name or is refused in a sentence."""
    made = spec_of(name).make()
    for p in free(name):
        values: list[Any] = list(p.choices) or ([True, False] if p.kind is bool else [])
        for value in values or ([] if p.low is None else [p.kind(p.low), p.kind(p.high)]):
            try:
                other = get_sampler(made, **{p.name: value})
            except VisarError as error:
                assert str(error).endswith(".")
            else:
                assert other.name == made.name


def test_a_fixed_field_is_another_sampler_or_the_pipelines() -> None:
    assert get_sampler("sjd", coupling="maximal").name == "scd"
    assert {p.name for p in parameters_of(spec_of("sjd").make()).values() if p.fixed} == {"coupling", "grid"}
    assert {p.name for p in parameters_of(spec_of("cspd-exact").make()).values() if p.fixed} == {
        "factor", "nested", "truncate",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "parameter", "value"),
    [("sjd", "window", 1), ("gsd", "group", 0), ("mar", "steps", 0), ("zipar", "ahead", 0)],
)
def test_below_the_range_is_refused(name: str, parameter: str, value: int) -> None:
    p = parameters_of(spec_of(name).make())[parameter]
    assert p.low == value + 1
    with pytest.raises(VisarError, match=parameter):
        get_sampler(name, **{parameter: value})


def test_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["samplers", "gsd"]) == 0
    text = capsys.readouterr().out
    assert "relaxed" in text and "group" in text and "a whole number, 1 to 128" in text and "coupling" not in text
    assert main(["samplers", "scd", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [p["name"] for p in said["parameters"]] == ["window", "init"]
    assert said["parameters"][0]["default"] == 16
    assert main(["samplers", "ar"]) == 0
    assert "PARAMETER" not in capsys.readouterr().out
    assert main(["samplers", "scdd"]) == 2
    assert "Did you mean 'scd'?" in capsys.readouterr().err
