"""The settings of sampling, written down once: the API, command line, demo, bulk runs and stats read these fields.

This module imports no torch, so that the command line can show its help at once. To add a setting, add a field here and
read it where it acts.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import index
from typing import TYPE_CHECKING, Any, TypeGuard

from visar.errors import VisarError, unknown
from visar.reading import short

if TYPE_CHECKING:
    from torch import Tensor

LEAST_TEMPERATURE = 1e-5  # of discrete tokens
LARGEST = 1e38  # of guidance scales and temperatures, which are float32 in a pass
DISCRETE, CONTINUOUS = "discrete", "continuous"
ANY_ORDER = "any-order"  # no kind of tokens: models by their `scan` (`TAKES`)
SCHEDULES = ("constant", "linear")
ORDERS = ("raster", "random", "halton", "farthest-point", "locality")  # `visar.engine.orders`
TAKES = {"any": ("order", "guidance_schedule")}  # settings of discrete tokens that only models of a `scan` have


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    only: str = "",
    flag: bool = True,
    box: bool = True,
    slider: tuple[float, float, float] | None = None,
) -> Any:
    """A field of `SamplingParams`: what it means, its range, and the `only` kind of tokens that has it.

    `flag` says whether the command line has it, and `box` whether the demo has it too; `slider` is the demo's: least,
    most and step.
    """
    about = {
        "help": help, "low": low, "high": high, "choices": choices, "only": only, "flag": flag, "box": flag and box,
        "slider": slider,
    }  # fmt: skip
    return field(default=default, compare=default is not None or flag, metadata=about)


@dataclass(frozen=True)
class SamplingParams:
    """How an image is sampled. None means the model's own default (`resolved`); for `seed`, a random one.

    A list of seeds has one for each image of a call: each image is the one that its seed gives alone.
    `forced_tokens` [N], whole numbers, or a list, gives tokens, and -1 where one is sampled around them; for
    continuous tokens it is [N, d], NaN where tokens are sampled. Numbers may be Python's, NumPy's or 0-d tensors.
    Raises `VisarError` for a value out of range.
    """

    seed: int | Sequence[int] | None = setting(0, "seed of all random numbers", low=0, high=2**64 - 1)
    guidance_scale: float | None = setting(
        None,
        "strength of classifier-free guidance; 1 is none",
        low=-LARGEST,
        high=LARGEST,
        slider=(0, 20, 0.1),
    )
    guidance_interval: int | None = setting(
        None, "the last position with guidance; -1 guides all", low=-1, high=2**63 - 1, only=DISCRETE, flag=False
    )
    guidance_schedule: str | None = setting(None, "guidance over the passes", choices=SCHEDULES, only=CONTINUOUS)
    temperature: float | None = setting(
        None, "randomness; 1 is the model's own", low=0.0, high=LARGEST, slider=(0.05, 5, 0.05)
    )
    top_k: int | None = setting(
        None, "sample among the K most likely tokens; 0 keeps all", low=0, only=DISCRETE, slider=(0, 5000, 1)
    )
    top_p: float | None = setting(
        None,
        "sample among the most likely tokens of this total probability",
        low=0.0,
        high=1.0,
        only=DISCRETE,
        slider=(0.05, 1, 0.01),
    )
    invariant: bool | None = setting(
        None, "passes of any width and batch give the same bits, which takes more time", only=DISCRETE, box=False
    )
    order: str | None = setting(
        None,
        "order of the tokens, for models that take any; each has a distribution of its own",
        choices=ORDERS,
        only=ANY_ORDER,
        box=False,
    )
    forced_tokens: Tensor | None = setting(None, "tokens that are given", flag=False)

    def __post_init__(self) -> None:
        if is_list(self.seed):
            self._set("seed", tuple(whole("seed", seed) for seed in self.seed))
        else:
            self._set("seed", whole("seed", self.seed))
        for name in ("guidance_interval", "top_k"):
            self._set(name, whole(name, getattr(self, name)))
        for name in ("guidance_scale", "temperature", "top_p"):
            self._set(name, number(name, getattr(self, name)))
        if self.invariant is not None:
            self._set("invariant", truth("invariant", self.invariant))
        for f in fields(self):
            value, about = getattr(self, f.name), f.metadata
            if value is None or f.name in ("forced_tokens", "invariant"):
                continue
            if about["choices"]:
                if not isinstance(value, str) or value not in about["choices"]:
                    raise VisarError(f"{f.name} must be {' or '.join(about['choices'])}, not {value!r}.")
                continue
            low, high = about["low"], about["high"]
            for one in value if isinstance(value, tuple) else (value,):
                if one is None or (low is not None and one < low) or (high is not None and one > high):
                    raise VisarError(f"{f.name} must be {range_of(f.name, one)}, not {short(one)}.")
        if self.top_p == 0:
            raise VisarError("top_p must be above 0 and at most 1, not 0.0.")
        if self.forced_tokens is not None:
            self._set("forced_tokens", as_tokens(self.forced_tokens))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @staticmethod
    def of(params: SamplingParams | Mapping[str, Any] | None = None, **keywords: Any) -> SamplingParams:
        """The `params` with those `keywords` that are not None; a `VisarError` for a name that is no setting."""
        names = [f.name for f in fields(SamplingParams)]
        if not isinstance(params, SamplingParams | Mapping | None):
            raise VisarError(f"params must be a SamplingParams, not a {type(params).__name__}.")
        for name in keywords if not isinstance(params, Mapping) else {**params, **keywords}:
            if name not in names:
                raise unknown("setting", name, names)
        if isinstance(params, Mapping):
            params = SamplingParams(**params)
        given = {name: value for name, value in keywords.items() if value is not None}
        return replace(params or SamplingParams(), **given)

    def unusual(self) -> str | None:
        """The first setting that is given and far from what images are made with, beyond the sliders of the demo."""
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("guidance_scale", "temperature") and value is not None:
                least, most, _ = f.metadata["slider"]
                if not least <= value <= most:
                    return f.name
        return None

    def resolved(self, defaults: SamplingParams) -> SamplingParams:
        """With the model's defaults for what is None, and a seed drawn where there is none."""
        own = {f.name: getattr(defaults, f.name) for f in fields(self) if getattr(self, f.name) is None}
        own["seed"] = secrets.randbits(32) if self.seed is None else self.seed
        return replace(self, **own)

    def check(self, tokens: str, scan: str = "raster") -> None:
        """Raise `VisarError` for a setting that models of such `tokens`, "discrete" or "continuous", do not have.

        `scan` is the model's (`visar.families.base.Family`).
        """
        if tokens == DISCRETE and self.temperature is not None and self.temperature < LEAST_TEMPERATURE:
            raise VisarError(
                f"temperature must be above 0 ({LEAST_TEMPERATURE:g} at least; for greedy decoding use top_k 1), "
                f"not {self.temperature}."
            )
        neutral = {"top_k": 0, "top_p": 1.0, "guidance_interval": -1, "invariant": False}
        for f in fields(self):
            only, value = f.metadata["only"], getattr(self, f.name)
            if not only or only == tokens or value is None or value == neutral.get(f.name, object()):
                continue
            if f.name in TAKES.get(scan, ()):
                continue
            if f.name == "order":
                raise VisarError("order is for models that were trained to sample in any order; this one has its own.")
            if f.name == "guidance_schedule" and value == "constant":
                continue  # what a model of discrete tokens does
            raise VisarError(f"{f.name} is for models of {only} tokens; those of this model are {tokens}.")

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold: all settings but the tokens, of which only the number that is forced is told."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["seed"] = list(self.seed) if isinstance(self.seed, tuple) else self.seed
        forced = values.pop("forced_tokens")
        return values | ({} if forced is None else {"forced_tokens": forced_count(forced)})


def range_of(name: str, value: float) -> str:
    """In words, what a setting may be that is not this `value`: "0 or more", "from 0 to 1"."""
    about = next(f.metadata for f in fields(SamplingParams) if f.name == name)
    low, high = about["low"], about["high"]
    if name == "top_p":
        return "above 0 and at most 1"
    if high == LARGEST:
        end = f"at most {high:g}" if value > high else f"{low:g} or more"
        return end if low == 0 else f"from {low:g} to {high:g}"
    if low is not None and high is not None:
        return f"from {low} to {high}"
    return f"{low:g} or more" if low is not None else f"at most {high}"


def plain(value: Any) -> Any:
    """The number in a NumPy scalar or a tensor of one number; anything else as it is, a tensor without values too."""
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 and not getattr(value, "is_meta", False):
        return value.item()
    return value


def is_list(value: Any) -> TypeGuard[Iterable[Any]]:
    """Whether it is a list of values, which NumPy's arrays and tensors of one dimension are too."""
    return getattr(value, "ndim", 0) == 1 or (isinstance(value, Sequence) and not isinstance(value, str | bytes))


def whole(name: str, value: Any) -> int | None:
    """An int, also of 2.0, NumPy's or a 0-d tensor; a `VisarError` for what is no whole number.

    Floats from 2**53 on are refused: there, several numbers are one float.
    """
    value = plain(value)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    try:
        if isinstance(value, bool):
            raise TypeError
        return index(value)
    except (TypeError, RuntimeError) as error:  # a tensor without values raises the second
        raise VisarError(f"{name} must be a whole number, not {value!r}.") from error


def truth(name: str, value: Any) -> bool:
    """True or False, also as 1 or 0, NumPy's or a 0-d tensor; a `VisarError` for anything else."""
    value = plain(value)
    if is_list(value) or value not in (False, True):
        raise VisarError(f"{name} must be true or false, not {value!r}.")
    return bool(value)


def of_64_bits(name: str, value: Any) -> int | None:
    """As `whole`; a `VisarError` also beyond the whole numbers of tensors."""
    found = whole(name, value)
    if found is not None and not -(2**63) <= found < 2**63:
        raise VisarError(f"{name} must be a whole number of 64 bits, not {short(found)}.")
    return found


def from_one(name: str, value: Any) -> int:
    """As `whole`, from 1 to the largest that every tensor takes; a `VisarError` for None too."""
    found = whole(name, value)
    if found is None or not 1 <= found < 2**31:
        raise VisarError(f"{name} must be a whole number from 1 to {2**31 - 1}, not {short(found)}.")
    return found


def number(name: str, value: Any) -> float | None:
    """A finite float, also of NumPy's or a 0-d tensor; a `VisarError` for anything else."""
    value = plain(value)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise VisarError(f"{name} must be a number, not {value!r}.")
    try:
        made = float(value)
    except OverflowError:  # of an int beyond all floats
        made = math.inf
    if not math.isfinite(made):
        raise VisarError(f"{name} must be a finite number, not {short(value)}.")
    return made


def as_tokens(value: Any) -> Tensor:
    """Forced tokens as a tensor, of which a list and a NumPy array are taken too."""
    import torch

    from visar.dtypes import WHOLE, has_values

    try:
        made = value.detach() if isinstance(value, torch.Tensor) else torch.as_tensor(value)
        if made.dtype == torch.bool or made.is_complex() or not has_values(made):
            raise TypeError
        if made.dtype == torch.uint64 and bool((made.long() < 0).any()):
            raise OverflowError  # such a number would become -1
        if made.dtype in WHOLE:
            made = made.long()  # torch compares no others without a sign
        if made.is_floating_point() and made.ndim == 1 and bool((made == made.round()).all()):
            if bool((made.abs() >= 2**53).any()):
                raise OverflowError
            made = made.long()  # ids as 3.0; a token of a continuous model is no single number
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise VisarError("forced_tokens must be a tensor or a list of token ids, -1 where one is sampled.") from error
    return made


def forced_count(tokens: Tensor) -> int:
    """How many tokens are given."""
    given = tokens.isfinite().all(-1) if tokens.is_floating_point() else tokens >= 0
    return int(given.sum())
