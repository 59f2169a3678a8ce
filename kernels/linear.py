"""Linear layers of few rows: on a CPU in the form that is the fastest on this machine, elsewhere as the library does.

`F.linear` hands oneDNN the plain weight, which it lays out again in every call. That can take as long as the product
itself where there are few rows, as in decoding. So in decoding (`visar.kernels.derived.steady_weights`) the layout may
be kept, a second copy of the weights, and what follows the product (SiLU, a factor, a residual) is then done on its way
out. Where the library is faster for a shape, a dtype and a number of rows, it is used: `visar.kernels.choice` measures.
The forms differ in rounding alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visar.errors import unknown
from visar.host import available_memory, has_bfloat16
from visar.kernels.backend import say_once
from visar.kernels.choice import fastest
from visar.kernels.derived import Derived, Steady, steady

# "plain" is the library's; "packed" keeps oneDNN's layout; "padded" also rounds the rows up to `LEAST_ROWS`; "auto" is
# the fastest of them.
Form = Literal["auto", "plain", "packed", "padded"]
FORMS = get_args(Form)[1:]
VARIABLE = "VISAR_LINEAR"
ROWS = 16  # a hint for the layout; any number of rows may follow
LEAST_ROWS = 4  # oneDNN can be faster with four rows than with fewer
MOST_ROWS = 64  # that are measured; more rows take the form of so many
LARGE = 2**21  # bytes of a weight: the model does not stay in the processor's caches from pass to pass
CACHES = 2**26  # bytes

_pinned: ContextVar[Form | None] = ContextVar("visar_linear_form", default=None)
_packed: Derived[Tensor] = Derived()


@contextmanager
def linear_form(form: Form) -> Iterator[None]:
    """Within it all products have this form, whatever their rows; "plain" and "packed" are reproducible anywhere."""
    token = _pinned.set(_checked(form))
    try:
        yield
    finally:
        _pinned.reset(token)


def pinned_form() -> Form:
    """The form that products of any number of rows have now; "auto" where it may depend on them."""
    if steady() is None or torch.is_grad_enabled():
        return "plain"
    return _pinned.get() or _checked(os.environ.get(VARIABLE) or "auto")


def _checked(form: str) -> Form:
    if form not in get_args(Form):
        raise unknown("form of linear layers", form, get_args(Form))
    return cast(Form, form)


class _Plan(NamedTuple):
    """How the product of a weight is done in this call."""

    weights: Sequence[Tensor]  # held, so that their ids are not others'
    bias: Tensor | None
    packed: Tensor | None = None
    padded: bool = False


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    silu: bool = False,
    times: Tensor | None = None,
    plus: Tensor | None = None,
) -> Tensor:
    """x [..., K] @ weight [N, K] + bias, then SiLU if asked for, then `times` [..., N] or `plus` [..., N] if given.

    The packed form rounds to bfloat16 once, after the last of them; the plain form after each. Outside of decoding, in
    training, compilation and export for example, the form is the plain one.
    """
    if torch.compiler.is_compiling() or (now := steady()) is None or torch.is_grad_enabled():
        return epilogue(F.linear(x, weight, bias), silu, times, plus)
    key = id(weight), x.numel(), x.dtype, silu, times is None, plus is None, _pinned.get()
    if (plan := now.plans.get(key)) is None:
        plan = now.plans[key] = _planned(x, (weight,), bias, silu, times, plus, now)
    if plan.packed is None:
        return epilogue(F.linear(x, weight, bias), silu, times, plus)
    return _product(x, plan.packed, bias, silu, times, plus, plan.padded)


def joined(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None) -> Tensor:
    """x [..., K] @ each of the `weights` [N, K], plus its bias, side by side: [..., sum of N].

    It is one product where that is laid out: of one second copy, in place of those that `linear` makes of each.
    """
    if not torch.compiler.is_compiling() and (now := steady()) is not None and not torch.is_grad_enabled():
        key = tuple(map(id, weights)), x.numel(), x.dtype, _pinned.get()
        if (plan := now.plans.get(key)) is None:
            bias = None if biases is None else torch.cat(list(biases))
            plan = now.plans[key] = _planned(x, weights, bias, False, None, None, now)
        if plan.packed is not None:
            return _product(x, plan.packed, plan.bias, False, None, None, plan.padded)
    given: Sequence[Tensor | None] = biases or (None,) * len(weights)
    return torch.cat([F.linear(x, w, b) for w, b in zip(weights, given, strict=True)], -1)


def repeats(x: Tensor, layers: nn.Module) -> int:
    """How often to repeat the rows x [R, W, K] of a pass through `layers`, so that they are fewest and fastest.

    oneDNN can be faster with `LEAST_ROWS` rows than with fewer. It is 1 outside of decoding and for a pinned form.
    """
    rows, now = x.numel() // x.shape[-1], steady()
    if now is None or not 0 < rows < LEAST_ROWS or LEAST_ROWS % rows or x.device.type != "cpu":
        return 1
    key = "repeats", id(layers), rows, x.dtype
    if pinned_form() != "auto":
        return 1
    if (found := now.plans.get(key)) is None:
        weights = [p for p in layers.parameters() if p.ndim == 2 and p.dtype == x.dtype]
        found = now.plans[key] = LEAST_ROWS // rows if weights and _gain(x, max(weights, key=len)) else 1
    return int(found)


def _gain(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of `LEAST_ROWS` rows is faster than one of those of x."""
    if not packs(x.dtype) or not _room_for(weight):
        return False

    def forms() -> dict[str, Callable[[int], Tensor]]:
        few, more = (
            _forms(weight.new_ones(n, weight.shape[1]), weight, None, False, None, None)
            for n in (x.numel() // x.shape[-1], LEAST_ROWS)
        )
        return {"plain": few["plain"], "packed": few["packed"], "repeated": more["packed"]}

    rows = x.numel() // x.shape[-1]
    what = "{} x {} x {} {} of a pass".format(rows, *reversed(weight.shape), str(x.dtype).removeprefix("torch."))
    return fastest(what, ("plain", "packed", "repeated"), forms) == "repeated"


def epilogue(y: Tensor, silu: bool = False, times: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """What `linear` does after the product."""
    if silu:
        y = F.silu(y)
    if times is not None:
        y = y * times
    return y if plus is None else y + plus


def _product(
    x: Tensor, packed: Tensor, bias: Tensor | None, silu: bool, times: Tensor | None, plus: Tensor | None, padded: bool
) -> Tensor:
    pointwise, activation = torch.ops.mkldnn._linear_pointwise, "swish" if silu else "none"
    if padded:
        rows = x.numel() // x.shape[-1]
        wide = torch.cat([x.reshape(rows, -1)] * -(-LEAST_ROWS // rows))  # faster than zeros
        y = pointwise(wide, packed, bias, activation, [], "")[:rows].view(*x.shape[:-1], -1)
        return epilogue(y, False, times, plus)
    other = plus if times is None else times
    if silu or other is None or other.dtype != x.dtype:
        return epilogue(pointwise(x, packed, bias, activation, [], ""), False, times, plus)
    if times is not None:
        return epilogue(pointwise.binary(x, times, packed, bias, "mul"), False, None, plus)
    return pointwise.binary(x, plus, packed, bias, "add")


def _planned(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, silu: bool, times: Tensor | None, plus: Tensor | None,
    now: Steady,
) -> _Plan:  # fmt: skip
    """The plan for such rows; the weights are laid out, one under the other, if that is of use."""
    weight, plain, rows = weights[0], _Plan(weights, bias), x.numel() // x.shape[-1]
    form = pinned_form()
    if form == "plain" or not rows or x.device.type != "cpu" or x.dtype != weight.dtype or not packs(x.dtype):
        return plain
    if weights not in _packed and not _room_for(*weights):
        return plain
    if form == "auto":
        rows = rows if rows < LEAST_ROWS else min(1 << (rows - 1).bit_length(), MOST_ROWS)
        dtypes = [None if t is None else str(t.dtype).removeprefix("torch.") for t in (weight, bias, times, plus)]
        what = "{} x {} x {} {} bias {} times {} plus {}{}".format(
            rows, weight.shape[1], sum(map(len, weights)), *dtypes, " silu" if silu else ""
        )
        if (found := now.plans.get(what)) is None:
            ones = x.new_ones(rows, x.shape[-1])
            found = now.plans[what] = fastest(
                what, FORMS, lambda: _forms(ones, _whole(weights), bias, silu, times, plus)
            )
        form = cast(Form, found)
    if form == "plain":
        return plain
    packed = _packed.of(weights, lambda: _laid_out(_whole(weights)))
    return _Plan(weights, bias, packed, form == "padded" and rows < LEAST_ROWS)


def _whole(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat([w.detach() for w in weights])


def _forms(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, times: Tensor | None, plus: Tensor | None
) -> dict[str, Callable[[int], Tensor]]:
    """The forms of a product with rows x [R, K], to be timed; copies of a large weight fill the caches."""
    times, plus = (None if t is None else t.new_ones(len(x), len(weight)) for t in (times, plus))
    size = weight.numel() * weight.element_size()
    plain = [weight, *(weight.clone() for _ in range(CACHES // (2 * size) if size > LARGE else 0))]
    packed = [_laid_out(w) for w in plain]

    def of(copies: list[Tensor]) -> Callable[[int], Tensor]:
        return lambda turn: copies[turn % len(copies)]

    weights, layouts = of(plain), of(packed)
    forms: dict[str, Callable[[int], Tensor]] = {
        "plain": lambda turn: epilogue(F.linear(x, weights(turn), bias), silu, times, plus),
        "packed": lambda turn: _product(x, layouts(turn), bias, silu, times, plus, False),
    }
    if len(x) < LEAST_ROWS:  # of other layouts than those just read
        forms["padded"] = lambda turn: _product(x, layouts(turn + len(packed) // 2), bias, silu, times, plus, True)
    return forms


def _laid_out(weight: Tensor) -> Tensor:
    made: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)
    return made


def packs(dtype: torch.dtype) -> bool:
    """Whether this processor's oneDNN works in `dtype`; in bfloat16 only where the processor has it."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and has_bfloat16())


def _room_for(*weights: Tensor) -> bool:
    if available_memory() > 4 * sum(w.numel() * w.element_size() for w in weights):
        return True
    say_once("Too little memory to lay the weights out for this processor; decoding goes on, slower.")
    return False
