"""The dtypes that a model runs in, that a file of weights may have, and of whole numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visar.errors import VisarError

COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INT6: torch.dtype = torch.int6  # type: ignore[attr-defined]  # the stubs of torch lack it
# The small ones are in files alone: products have no such kernels.
STORED = (*COMPUTED, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, INT6)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def checked_dtype(what: str, value: Any, allowed: Sequence[torch.dtype] = COMPUTED) -> torch.dtype:
    """The dtype of a torch.dtype or its name. Raises `VisarError` unless it is one of those `allowed`."""
    found = getattr(torch, value, value) if isinstance(value, str) else value
    if not isinstance(found, torch.dtype) or found not in allowed:
        names = ", ".join(str(dtype) for dtype in allowed)
        raise VisarError(f"{what} must be a torch.dtype ({names}), not {value!r}.")
    return found


def has_values(tensor: Tensor) -> bool:
    """Whether it has a number in each place that any operation can read.

    A tensor on the meta device has none, and few operations know sparse, nested and quantised ones.
    """
    plain = tensor.layout == torch.strided and not tensor.is_nested
    return plain and not tensor.is_meta and not tensor.is_quantized
