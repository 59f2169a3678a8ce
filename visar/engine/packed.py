"""Matrices in few bits within a file: whole numbers, and a scale for each row.

A row is its scale times whole numbers from -127 to 127 (`torch.int8`) or from -31 to 31 (`torch.int6`, four of them in
three bytes). The number below those is -0: models, drafters and autoencoders know each other by the signs of weights
(`fingerprint`), which stay. Of normally distributed weights this loses 0.7% or 2.8% of their root mean square; float8
e4m3 loses 2.7%. It is about files: weights are read as float32. `visar.engine.quantization` is about products.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from visar.dtypes import INT6
from visar.engine.quantization import rounded
from visar.errors import VisarError
from visar.host import check_memory

PACKED = (torch.int8, INT6)
LARGEST = 1e38  # of a weight; a row's scale times its largest number may be a little more than was rounded
ZERO = {torch.int8: -128, INT6: -32}  # -0
SCALE = ".scale"  # follows the key of the matrix


def packed(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file. Vectors, and what is empty or has no floating-point numbers, stay as they are.

    A tensor of more than two dimensions, or whose rows are no multiple of 4 long, has 8 bits at least.
    """
    found = {}
    for key, value in state.items():
        if not value.is_floating_point() or value.ndim < 2 or not value.numel():
            found[key] = value
            continue
        six = dtype == INT6 and value.ndim == 2 and value.shape[1] % 4 == 0
        whole, scale = rounded(value.flatten(1), "int6" if six else "int8")
        whole[(whole == 0) & value.flatten(1).signbit()] = ZERO[INT6 if six else torch.int8]
        found[key] = _three_bytes(whole) if six else whole.view_as(value)
        found[key + SCALE] = scale[:, None]
    return found


def unpacked(state: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """The tensors that `packed` was given, but for rounding; those without a scale as they are.

    Raises `VisarError` for a scale that does not fit its matrix, for a product beyond float32, and, before anything is
    multiplied, where the memory is too small.
    """
    scales = {key: key.removesuffix(SCALE) for key in state if key.endswith(SCALE) and key.removesuffix(SCALE) in state}
    found = {key: value for key, value in state.items() if key not in scales}
    rows_of = [found[key] for key in scales.values()]
    check_memory(path, sum(4 * rows.numel() * (4 / 3 if rows.dtype == torch.uint8 else 1) for rows in rows_of))
    for scale, key in scales.items():
        rows, of_rows = found[key], state[scale]
        fits = rows.ndim >= 2 and of_rows.is_floating_point() and of_rows.shape == (len(rows), 1)
        if not fits or (rows.dtype == torch.uint8 and (rows.ndim != 2 or rows.shape[1] % 3)):
            raise VisarError(f"Tensor {scale!r} of {path} is no scale of {key!r}: one number for each row of a matrix.")
        zero = ZERO.get(INT6 if rows.dtype == torch.uint8 else rows.dtype)
        rows = _of_three_bytes(rows) if rows.dtype == torch.uint8 else rows
        found[key] = (rows.flatten(1) * of_rows.float()).view(rows.shape)
        if zero is not None:
            found[key].masked_fill_(rows == zero, -0.0)
        if not found[key].isfinite().all():
            raise VisarError(f"Tensor {key!r} of {path} holds a NaN or an infinity.")
    return found


def _three_bytes(whole: Tensor) -> Tensor:
    """Numbers [rows, 4n] from -32 to 31 as bytes [rows, 3n], the first of four in the lowest bits."""
    four = (whole.int() + 32).unflatten(1, (-1, 4))
    word = four[..., 0] | four[..., 1] << 6 | four[..., 2] << 12 | four[..., 3] << 18
    return torch.stack([word & 255, word >> 8 & 255, word >> 16], -1).flatten(1).to(torch.uint8)


def _of_three_bytes(stored: Tensor) -> Tensor:
    """What `_three_bytes` was given."""
    three = stored.int().unflatten(1, (-1, 3))
    word = three[..., 0] | three[..., 1] << 8 | three[..., 2] << 16
    return torch.stack([word & 63, word >> 6 & 63, word >> 12 & 63, word >> 18], -1).flatten(1) - 32
