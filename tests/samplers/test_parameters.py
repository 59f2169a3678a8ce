"""What samplers say of their parameters, which forms and tables are built from."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from visar.cli import main
from visar.errors import VisarError
from visar.samplers import SAMPLERS, get_sampler


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_option_says_what_it_is(name: str) -> None:
    made = get_sampler(name)
    for p in SAMPLERS[name].options.values():
        assert p.help and p.default == getattr(made, p.name) and isinstance(p.default, p.kind)
        if p.kind in (int, float):
            assert p.low is not None and p.high is not None and p.low <= p.default <= p.high
        if p.choices:
            assert p.default in p.choices


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_offered_leaves_the_sampler_what_it_is(name: str) -> None:
    """Every choice, and the lower end of every range, makes a sampler of the same name or is refused in a sentence."""
    made = get_sampler(name)
    for p in SAMPLERS[name].options.values():
        values: list[Any] = list(p.choices) or ([True, False] if p.kind is bool else [])
        for value in values or ([] if p.low is None else [p.kind(p.low), p.kind(p.high)]):
            try:
                other = get_sampler(made, **{p.name: value})
            except VisarError as error:
                assert str(error).endswith(".")
            else:
                assert other.name == made.name


@pytest.mark.parametrize(
    ("name", "parameter", "value"),
    [("sjd", "window", 1), ("gsd", "group", 0), ("mar", "steps", 0), ("zipar", "ahead", 0)],
)
def test_below_the_range_is_refused(name: str, parameter: str, value: int) -> None:
    p = SAMPLERS[name].options[parameter]
    assert p.low == value + 1
    with pytest.raises(VisarError, match=parameter):
        get_sampler(name, **{parameter: value})


@pytest.mark.parametrize("name", SAMPLERS)
def test_other_types_are_refused(name: str) -> None:
    """Also of a class that is called itself: NaN, a text and a truth value pass some tests of a range."""
    cls = type(get_sampler(name))
    for p in SAMPLERS[name].options.values():
        values: list[Any] = [None, [1], torch.tensor([1, 2]), torch.tensor(1, device="meta"), math.nan, math.inf]
        for value in [*values, *([] if p.kind is str else ["x"]), *([] if p.kind is bool else [True])]:
            with pytest.raises(VisarError, match=f"{p.name} must be"):
                cls(**{p.name: value})


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
