"""Linear layers of few rows: on a CPU with weights laid out once as oneDNN wants them, elsewhere as the library does.

`F.linear` hands oneDNN the plain weight, which it lays out again in every call. That takes as long as the product
itself where there are few rows, as in decoding, so the layout is cached: a second copy of the weights, made on first
use and made again when the weight has changed. What follows the product (SiLU, a factor, a residual) is done on its way
out.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visar.host import available_memory, has_bfloat16
from visar.kernels.backend import say_once

ROWS = 16  # a hint for the layout; any number of rows may follow
LEAST_ROWS = 4  # oneDNN is quicker with four rows than with two or three, where the weight is
LARGE = 2**19  # numbers or more


class _Packed(NamedTuple):
    of: weakref.ref[Tensor]
    state: tuple[int, int, torch.dtype]  # when it was laid out: changed or converted since, it is another
    weight: Tensor


_packed: dict[int, _Packed] = {}


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

    The packed form rounds to bfloat16 once, after the last of them; the plain form after each.
    """
    if (packed := _packed_weight(x, weight)) is None:
        return epilogue(F.linear(x, weight, bias), silu, times, plus)
    rows = x.numel() // x.shape[-1]
    if 1 < rows < LEAST_ROWS and weight.numel() >= LARGE:
        wide = F.pad(x.reshape(rows, -1), (0, 0, 0, LEAST_ROWS - rows))
        y = torch.ops.mkldnn._linear_pointwise(wide, packed, bias, "swish" if silu else "none", [], "")
        return epilogue(y[:rows].view(*x.shape[:-1], -1), False, times, plus)
    other = plus if times is None else times
    if silu or other is None or other.dtype != x.dtype:
        y = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "swish" if silu else "none", [], "")
        return epilogue(y, False, times, plus)
    if times is not None:
        y = torch.ops.mkldnn._linear_pointwise.binary(x, times, packed, bias, "mul")
        return epilogue(y, False, None, plus)
    return torch.ops.mkldnn._linear_pointwise.binary(x, plus, packed, bias, "add")


def epilogue(y: Tensor, silu: bool = False, times: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """What `linear` does after the product."""
    if silu:
        y = F.silu(y)
    if times is not None:
        y = y * times
    return y if plus is None else y + plus


def _packed_weight(x: Tensor, weight: Tensor) -> Tensor | None:
    """The weight as oneDNN wants it; None where the plain layout is used: on a GPU, in training, without oneDNN."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or x.dtype != weight.dtype or weight.is_inference():
        return None
    cached = _packed.get(id(weight))
    if cached is not None and cached.of() is weight and cached.state == _state(weight):
        return cached.weight
    if not packs(weight.dtype) or not _room_for(weight):
        return None
    key = id(weight)
    made = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)
    gone = weakref.ref(weight, lambda _: _packed.pop(key, None))
    _packed[key] = _Packed(gone, _state(weight), made)
    return made


def _state(weight: Tensor) -> tuple[int, int, torch.dtype]:
    return weight._version, weight.data_ptr(), weight.dtype


def packs(dtype: torch.dtype) -> bool:
    """Whether this processor's oneDNN works in `dtype`; in bfloat16 only where the processor has it."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and has_bfloat16())


def _room_for(weight: Tensor) -> bool:
    if available_memory() > 4 * weight.numel() * weight.element_size():
        return True
    say_once("Too little memory to lay the weights out for this processor; decoding goes on, slower.")
    return False
