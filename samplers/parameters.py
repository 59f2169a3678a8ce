"""What a sampler's fields are: their kind, range and meaning, for forms, tables and the command line.

A field declares it, `window: int = option(16, "inputs of a pass", 2, 64)`; what is checked stays with the
sampler, whose `__post_init__` has the last word. Fields without `option` are no choice of a user of a named sampler:
they make it another one of the table, or the pipeline fills them in.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_type_hints


@dataclass(frozen=True)
class Parameter:
    """One option of a sampler.

    `kind`: bool, int, float or str. `low` and `high` bound what makes sense, which is less than what a sampler
    accepts. `choices`: the values of a field that names one, else empty.
    """

    name: str
    kind: type
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def range(self) -> str:
        """What is allowed, in words."""
        if self.choices:
            return ", ".join(self.choices)
        if self.kind is bool:
            return "true, false"
        if self.low is None:
            return "text"
        kind = "a whole number" if self.kind is int else "a number"
        return f"{kind}, {self.low:g} to {self.high:g}" if self.high is not None else f"{kind} from {self.low:g}"


def option(default: Any, help: str, low: float | None = None, high: float | None = None) -> Any:
    """A dataclass field with what `Parameter` says of it."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


def parameters_of(sampler: Any) -> dict[str, Parameter]:
    """The options of a sampler by name; the defaults are the values that it has."""
    found = [f for f in fields(sampler) if f.metadata] if is_dataclass(sampler) else []
    hints = get_type_hints(type(sampler)) if found else {}
    made = {}
    for f in found:
        value = getattr(sampler, f.name)
        made[f.name] = Parameter(f.name, type(value), value, choices=get_args(hints[f.name]), **f.metadata)
    return made
