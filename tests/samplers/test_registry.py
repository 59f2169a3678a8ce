"""The table of samplers: names, presets, what is no sampler, and the catalogue that is read from the source."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from visar.errors import VisarError
from visar.samplers import (
    DEFAULTS,
    SAMPLERS,
    Autoregressive,
    BeamTree,
    MaskedAutoregressive,
    Speculative,
    SpeculativeJacobi,
    TreeSpeculative,
    check_sampler,
    default_sampler,
    get_sampler,
    load_sampler,
    register_sampler,
    registry,
    samplers_for,
)
from visar.samplers.catalogue import catalogue


def test_the_catalogue_is_the_table() -> None:
    read = catalogue()
    assert read == dict(SAMPLERS) and list(read) == list(SAMPLERS)
    for name, spec in read.items():
        assert list(spec.options) == list(SAMPLERS[name].options)


def test_the_table_is_shown_without_torch() -> None:
    code = """
import sys
from visar.cli import main
assert main(["samplers"]) == 0 and main(["samplers", "eagle2"]) == 0
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_name_is_that_of_the_table(name: str) -> None:
    made, spec = get_sampler(name), SAMPLERS[name]
    assert made.name == name and made.exact == spec.exact
    built = type(made)(**{f.name: getattr(made, f.name) for f in fields(made)})
    assert built == made and built.name == name
    assert (spec.exactness == "exact") == (spec.exact and not spec.note) and spec.tokens in DEFAULTS


def test_a_name_is_kept_with_other_parameters() -> None:
    assert get_sampler("mar-256", steps=9).name == "mar-256" and MaskedAutoregressive(steps=9).name == "mar"
    assert get_sampler(get_sampler("eagle-chain"), gamma=2).name == "eagle-chain"


@pytest.mark.parametrize(
    ("sampler", "name"),
    [
        (SpeculativeJacobi(window=8), "sjd"),
        (SpeculativeJacobi(4, coupling="gumbel"), "scd-gumbel"),
        (MaskedAutoregressive(steps=32, head_steps=50), "mar-32-50"),
        (Speculative(drafter="exit"), "kangaroo"),
        (Speculative(drafter="mine"), "speculative"),
        (TreeSpeculative(tree="2x2", drafter="medusa"), "medusa"),
        (TreeSpeculative(children="independent"), "spectr"),
        (BeamTree(beam=2, depth=2, drafter="model"), "eagle2"),
    ],
)
def test_the_name_of_one_that_was_built(sampler: Any, name: str) -> None:
    assert sampler.name == name


def test_a_class_that_is_not_registered_has_its_own_name() -> None:
    @dataclass(frozen=True)
    class Mine(SpeculativeJacobi):
        pass

    assert Mine().name == "Mine"


def test_kinds_of_tokens() -> None:
    discrete, continuous = samplers_for("discrete"), samplers_for("continuous")
    diagonal, any_order = samplers_for("discrete", "diagonal"), samplers_for("discrete", "any")
    groups = [name for name in any_order if name not in discrete]
    assert (
        list(SAMPLERS) == [*discrete, *sorted([*diagonal, *groups]), *continuous]
        and "scd" in discrete
        and "mar" in continuous
    )
    assert (
        list(diagonal) == ["diagonal"]
        and groups == ["parallel"]
        and SAMPLERS["diagonal"].exactness == SAMPLERS["diagonal"].note
    )
    assert [default_sampler(kind) for kind in DEFAULTS] == list(DEFAULTS.values())
    assert default_sampler("discrete", "diagonal") == "diagonal"
    assert {kind: SAMPLERS[name].tokens for kind, name in DEFAULTS.items()} == {k: k for k in DEFAULTS}


def test_what_makes_it_another_sampler_is_no_parameter() -> None:
    with pytest.raises(VisarError, match=r"'sjd' has no parameter 'coupling'; it has init, window\."):
        get_sampler("sjd", coupling="maximal")
    with pytest.raises(VisarError, match=r"'ar' has no parameter 'window'; it has none\."):
        get_sampler(Autoregressive(), window=3)
    assert get_sampler("sjd", window=None) == get_sampler("sjd")


def test_registering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_SPECS", dict(registry._SPECS))
    monkeypatch.setattr(registry, "_MAKERS", dict(registry._MAKERS))

    @register_sampler("mine-2", paper="none", exact=False, note="greedy", rows=2)
    @register_sampler("mine", paper="none", exact=False)
    @dataclass(frozen=True)
    class Mine(SpeculativeJacobi):
        rows: int = 1
        exact = False

    assert [n for n in samplers_for("discrete") if n.startswith("mine")] == ["mine-2", "mine"]
    assert (get_sampler("mine-2").rows, SAMPLERS["mine-2"].exactness, SAMPLERS["mine"].exactness) == (
        2,
        "greedy",
        "relaxed",
    )
    assert Mine(rows=2, window=3).name == "mine-2" and Mine().name == "mine"
    with pytest.raises(VisarError, match="There is a sampler 'scd' already"):
        register_sampler("scd", paper="")(Mine)
    with pytest.raises(VisarError, match="registered with exact=True, and its class says False"):
        register_sampler("mine-3", paper="")(Mine)


class Bare:
    """What a sampler needs, and no more."""

    name, exact, window = "bare", True, 1

    def begin(self, session: Any, target: Any, noise: Any) -> Any: ...

    def step(self, session: Any, state: Any) -> None: ...


def test_an_object_with_the_protocol_is_a_sampler() -> None:
    bare = Bare()
    assert check_sampler(bare, "discrete") is bare and get_sampler(bare) is bare
    with pytest.raises(VisarError, match="'bare' has no parameter 'window'; it has none"):
        get_sampler(bare, window=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(name=""), "Mine.name must be a text, not ''"),
        (dict(exact="yes"), "Mine.exact must be true or false, not 'yes'"),
        (dict(window=0), "Mine.window must be the inputs of a pass, a whole number from 1, not 0"),
        (dict(step=None), r"Mine is no sampler: it has no method step\(session, state\)"),
        (dict(begin=lambda self, session: None), "Mine.begin must take session, target, noise"),
        (dict(__hash__=None), r"Mine cannot be hashed; make it a dataclass\(frozen=True\)"),
        (dict(tokens="continuous"), "'bare' is for continuous tokens"),
    ],
)
def test_what_is_missing_is_said(change: dict[str, Any], message: str) -> None:
    with pytest.raises(VisarError, match=message):
        check_sampler(type("Mine", (Bare,), change)(), "discrete")


def test_no_samplers() -> None:
    with pytest.raises(VisarError, match=r"object, not a class: give Bare\(\)"):
        check_sampler(Bare)
    with pytest.raises(VisarError, match="int is no sampler: it has no name, a text"):
        check_sampler(3)


def test_a_sampler_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from visar.samplers import SpeculativeJacobi\nmade = SpeculativeJacobi(window=5)\nnumber = 3\n"
        "def make():\n    return SpeculativeJacobi(window=6)\ndef broken():\n    return 1 / 0\n"
    )
    assert load_sampler(f"{file}:made").window == 5 and get_sampler(f"{file}:make", window=4).window == 4
    assert get_sampler(f"{file}:SpeculativeJacobi") == SpeculativeJacobi()
    for place, message in (
        (f"{file}:absent", "mine.py has no sampler 'absent'"),
        (f"{tmp_path}/no.py:x", "There is no file"),
        (f"{file}:number", "int is no sampler"),
        (f"{file}:broken", "mine.py, line 7: ZeroDivisionError"),
        (f"{file}:a b", "takes a Python file and a sampler in it"),
    ):
        with pytest.raises(VisarError, match=message):
            get_sampler(place)
