"""The samplers by name. `@register_sampler` decorates a sampler's class; importing this file needs no torch."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache, cached_property, partial
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

from visar import user_code
from visar.errors import VisarError, unknown
from visar.params import number, of_64_bits, plain
from visar.reading import short
from visar.samplers.parameters import Parameter, parameters_of

DEFAULTS = {"discrete": "scd", "continuous": "mar-headspec"}  # by the kind of tokens
# Of the samplers for a model, by its own: "any" is one that samples cells in any order that is fixed beforehand.
SCANS = {"raster": ("raster", "rows"), "any": ("raster", "groups"), "diagonal": ("diagonal",)}
FOLDER = Path(__file__).parent
_SPECS: dict[str, SamplerSpec] = {}
_MAKERS: dict[str, partial[Any]] = {}
C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class SamplerSpec:
    """A registered sampler.

    `exact`: whether images have the distribution of sequential sampling; `note`: in what sense they have it, where a
    yes or no does not say it. `tokens`: "discrete" or "continuous"; `scan`: "raster" for one token after the other, in
    the order of the model, "rows" for rows of the image side by side, "diagonal" for models with two-way heads, or
    "groups" of cells for those that sample in any order.
    `drafter`: the kind of drafter that it needs, one of `visar.drafters.KINDS`, "draft" for a smaller MAR, or None.
    `options`: what a user may set.
    """

    name: str
    paper: str
    tokens: str
    exact: bool
    note: str
    drafter: str | None
    options: Mapping[str, Parameter]
    module: str = field(repr=False)
    scan: str = "raster"

    @property
    def exactness(self) -> str:
        """ "exact", "relaxed", or the note."""
        return self.note or ("exact" if self.exact else "relaxed")

    def parameters(self) -> dict[str, Any]:
        """The values of its options by default."""
        return {name: parameter.default for name, parameter in self.options.items()}

    def make(self, **parameters: Any) -> Any:
        """The sampler. Raises `VisarError` for a parameter that it has not, or a value that it refuses."""
        _load()
        maker = _MAKERS[self.name]
        _check_parameters(self.name, maker.func, parameters)
        made = maker(**_all_typed(self.options, parameters))
        object.__setattr__(made, "name", self.name)
        return made


class _Samplers(Mapping[str, SamplerSpec]):
    """All that are registered. The modules of this folder are imported when it is first looked at."""

    def __getitem__(self, name: str) -> SamplerSpec:
        _load()
        return _SPECS[name]

    def __iter__(self) -> Iterator[str]:
        _load()
        return iter([spec.name for spec in ordered(_SPECS.values())])

    def __len__(self) -> int:
        _load()
        return len(_SPECS)


SAMPLERS: Mapping[str, SamplerSpec] = _Samplers()


class Registered:
    """A sampler that knows its name: the one it was made by, or for one built from its class that of `name_of`.

    Its options are of their defaults' types, so that NaN, a text or a truth value passes no test of a range. Raises
    `VisarError` for others.
    """

    def __post_init__(self) -> None:
        for f in getattr(self, "__dataclass_fields__", {}).values():
            if f.metadata:
                object.__setattr__(self, f.name, _typed(f.name, type(f.default), getattr(self, f.name)))

    @cached_property
    def name(self) -> str:
        return name_of(self)


def register_sampler(
    name: str, *, paper: str, exact: bool = True, note: str = "", drafter: str | None = None, **preset: Any
) -> Callable[[C], C]:
    """Register the class below under `name`; see `SamplerSpec` for the arguments.

    `preset` are values of the class's fields under this name, as is `drafter` where the class has such a
    field. A class may have several names; the nearest is listed first. All arguments must be literals: the catalogue
    (`visar.samplers.catalogue`) reads them without running the file.
    """

    def register(cls: C) -> C:
        values = preset
        if drafter is not None and is_dataclass(cls) and "drafter" in {f.name for f in fields(cls)}:
            values = preset | {"drafter": drafter}
        if name in _SPECS and _SPECS[name].module != cls.__module__:
            raise VisarError(f"There is a sampler {name!r} already; register yours under another name.")
        maker = partial(cls, **values)
        made = maker()
        if made.exact != exact:
            raise VisarError(f"Sampler {name!r} is registered with exact={exact}, and its class says {made.exact}.")
        tokens = getattr(cls, "tokens", "discrete")
        _SPECS[name] = SamplerSpec(
            name, paper, tokens, exact, note, drafter, parameters_of(made), cls.__module__, scan_of(cls)
        )
        _MAKERS[name] = maker
        return cls

    return register


def ordered(specs: Iterable[SamplerSpec]) -> list[SamplerSpec]:
    """By kind of tokens and order; those that need no drafter first, exact ones before relaxed, then by file."""
    return sorted(specs, key=_rank)


def _rank(s: SamplerSpec) -> tuple[bool, bool, bool, bool, str]:
    return s.tokens != "discrete", s.scan in ("diagonal", "groups"), bool(s.drafter), s.exactness == "relaxed", s.module


@cache
def _load() -> None:
    for module in pkgutil.iter_modules([str(FOLDER)]):
        importlib.import_module(f"visar.samplers.{module.name}")


def samplers_for(tokens: str, scan: str = "raster") -> dict[str, SamplerSpec]:
    """The samplers of "discrete" or of "continuous" tokens, by name; of discrete ones those for models of a `scan`."""
    return {name: spec for name, spec in SAMPLERS.items() if spec.tokens == tokens and _fits(spec, scan)}


def _fits(sampler: Any, scan: str) -> bool:
    """Whether a sampler or its spec is for models of a `scan`; there are no drafters for those of any order."""
    return scan_of(sampler) in SCANS[scan] and not (scan == "any" and getattr(sampler, "drafter", None))


def default_sampler(tokens: str, scan: str = "raster") -> str:
    """The name of the sampler that a model of this kind of tokens and `scan` takes where none is given."""
    usual = DEFAULTS[tokens]
    return usual if usual in (own := samplers_for(tokens, scan)) else next(iter(own))


def scan_of(sampler: Any) -> str:
    """The order in which a sampler samples tokens."""
    return getattr(sampler, "scan", "raster")


def spec_of(name: str) -> SamplerSpec:
    """The registered sampler of this name; a `VisarError` where there is none."""
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)
    return SAMPLERS[name]


def get_sampler(sampler: Any, **parameters: Any) -> Any:
    """A sampler by name or as `FILE.py:NAME` (`load_sampler`), or the one given, with these parameters; None changes
    none.

    Raises `VisarError` for an unknown name, a parameter that the sampler does not have, or a value that it refuses.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    if isinstance(sampler, str) and not user_code.is_place(sampler):
        return spec_of(sampler).make(**given)
    made = load_sampler(sampler) if isinstance(sampler, str) else sampler
    if not given:
        return made
    _check_parameters(check_sampler(made).name, type(made), given)
    changed = replace(made, **_all_typed(parameters_of(made), given))
    object.__setattr__(changed, "name", made.name)
    return changed


def values_of(sampler: Any) -> dict[str, Any]:
    """All fields of a sampler with their values, but those that a model fills in; none of one that is no dataclass."""
    own = fields(sampler) if is_dataclass(sampler) else ()
    return {f.name: plain(getattr(sampler, f.name)) for f in own if f.compare}


def name_of(sampler: Any) -> str:
    """The name of a sampler that was built from its class: of the registered ones with its rule, which are the fields
    that are no options, the one with its drafter, and of these the one with its preset. Else the class's own name."""

    def rule(one: Any) -> dict[str, Any]:
        return {
            f.name: getattr(one, f.name) for f in fields(one) if f.compare and not f.metadata if f.name != "drafter"
        }

    def likeness(name: str) -> tuple[bool, int]:
        preset = _MAKERS[name].keywords
        same = all(getattr(sampler, key) == value for key, value in preset.items())
        own = getattr(_MAKERS[name](), "drafter", None)
        return own == getattr(sampler, "drafter", None), len(preset) if same else 0

    names = [n for n, maker in _MAKERS.items() if maker.func is type(sampler) and rule(maker()) == rule(sampler)]
    return max(names, key=likeness) if names else type(sampler).__name__  # of equal ones the first registered


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and 0 < int(value) < 2**63


def check_sampler(sampler: Any, tokens: str | None = None, scan: str | None = None) -> Any:
    """The object, if it is a sampler of this kind of tokens and `scan`; else a `VisarError` that says what it lacks.

    A sampler has `name`, `exact`, `window`, `begin(session, target, noise)` and `step(session, state)`, as in
    `visar.samplers.base.Sampler`, and is hashable. `tokens` is "discrete" where it says nothing else.
    """
    kind = type(sampler).__name__
    if isinstance(sampler, type):
        raise VisarError(f"A sampler is an object, not a class: give {sampler.__name__}().")
    for name, said, good in (
        ("name", "a text", lambda x: isinstance(x, str) and x),
        ("exact", "true or false", lambda x: isinstance(x, bool)),
        (
            "window",
            "the inputs of a pass, a whole number from 1",
            lambda x: isinstance(x, Integral) and 0 < int(x) < 2**63,
        ),
    ):
        if not hasattr(sampler, name):
            raise VisarError(f"{kind} is no sampler: it has no {name}, {said}.")
        if not good(getattr(sampler, name)):
            raise VisarError(f"{kind}.{name} must be {said}, not {short(getattr(sampler, name))}.")
    for name, arguments in (("begin", "session, target, noise"), ("step", "session, state")):
        if not callable(method := getattr(sampler, name, None)):
            raise VisarError(f"{kind} is no sampler: it has no method {name}({arguments}).")
        try:
            inspect.signature(method).bind(*arguments.split(", "))
        except TypeError as error:
            raise VisarError(f"{kind}.{name} must take {arguments}.") from error
    if type(sampler).__hash__ is None:
        raise VisarError(f"{kind} cannot be hashed; make it a dataclass(frozen=True).")
    own = getattr(sampler, "tokens", "discrete")
    if tokens is not None and own != tokens:
        known = ", ".join(samplers_for(tokens))
        raise VisarError(f"Sampler {sampler.name!r} is for {own} tokens. For {tokens} ones there are: {known}.")
    if scan is not None and not _fits(sampler, scan):
        known = ", ".join(samplers_for(own, scan))
        kinds = {
            "raster": "samples in raster order", "diagonal": "samples by diagonals, with two-way heads",
            "rows": "samples rows side by side", "any": "samples in any order",
            "groups": "samples groups of cells, in any order",
        }  # fmt: skip
        found = scan_of(sampler)
        what = "needs a drafter" if found in SCANS[scan] else kinds.get(found, found)
        raise VisarError(
            f"Sampler {sampler.name!r} {what}, and this model {kinds[scan]}. For it there "
            f"{'is' if ',' not in known else 'are'}: {known}."
        )
    return sampler


def load_sampler(spec: str) -> Any:
    """The sampler that `FILE.py:NAME` names, or that a class or function of this name makes when called.

    The file is run, so it must be code that you trust.
    """
    found = user_code.load(spec, "--sampler", "sampler")
    if isinstance(found, type) or (callable(found) and not hasattr(found, "step")):
        with user_code.blamed():
            found = found()
    return check_sampler(found)


def _all_typed(options: Mapping[str, Parameter], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values, those of options in their types."""
    return {n: _typed(n, options[n].kind, value) if n in options else plain(value) for n, value in given.items()}


def _typed(name: str, kind: type, value: Any) -> Any:
    """The value of an option: for numbers Python's own, of which NumPy's, 0-d tensors and 8.0 are taken too."""
    read: dict[type, Any] = {int: of_64_bits, float: number}
    if kind in read and value is not None:
        return read[kind](name, value)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    value = plain(value)
    if kind in words and not isinstance(value, kind):
        raise VisarError(f"{name} must be {words[kind]}, not {value!r}.")
    return value


def _check_parameters(name: str, cls: Any, given: Mapping[str, Any]) -> None:
    # Fields that are compared and no options make it another sampler of the table.
    own = [f for f in fields(cls) if f.metadata or not f.compare] if is_dataclass(cls) else []
    for key in given:
        if key not in {f.name for f in own}:
            options = ", ".join(sorted(f.name for f in own if f.metadata))
            raise VisarError(f"Sampler {name!r} has no parameter {key!r}; it has {options or 'none'}.")
