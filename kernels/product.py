"""A matrix product and a norm whose rows do not depend on the number of rows: the invariant mode's on a GPU.

A program has a block of rows and columns and goes through K in steps of one size, from the first to the last: no
split-K. What differs with the number of rows is only how many programs there are. Few rows are padded to a block: their
time is that of reading the weights.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from visar.kernels.backend import jit, tl, triton

BLOCK_M, BLOCK_N, BLOCK_K = 32, 64, 64


def product_torch(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] @ weight [N, K], summed in fp32: [M, N] in the dtype of x."""
    return F.linear(x.float(), weight.float()).to(x.dtype)


@jit
def _product(  # type: ignore[no-untyped-def]
    out, x, weight, rows, outputs, inputs, x_row, w_row,
    widened: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * block_m + tl.arange(0, block_m)
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    k = tl.arange(0, block_k)
    x += m.to(tl.int64)[:, None] * x_row + k[None, :]
    weight += n.to(tl.int64)[:, None] * w_row + k[None, :]
    total = tl.zeros([block_m, block_n], tl.float32)
    for begin in range(0, inputs, block_k):
        inside = (begin + k < inputs)[None, :]
        a = tl.load(x + begin, inside & (m < rows)[:, None], 0.0)
        b = tl.load(weight + begin, inside & (n < outputs)[:, None], 0.0)
        if widened:  # Triton's interpreter multiplies the bits of bf16 as integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        total += tl.dot(a, tl.trans(b), input_precision="ieee")
    to = out + m.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(to, total.to(out.dtype.element_ty), (m < rows)[:, None] & (n < outputs)[None, :])


def product_triton(x: Tensor, weight: Tensor) -> Tensor:
    """`product_torch` as one Triton launch."""
    x, weight = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, weight))
    (rows, inputs), outputs = x.shape, len(weight)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if out.numel():
        _product[(triton.cdiv(outputs, BLOCK_N), triton.cdiv(rows, BLOCK_M))](
            out, x, weight, rows, outputs, inputs, x.stride(0), weight.stride(0), widened=not x.is_cuda,
            block_m=BLOCK_M, block_n=BLOCK_N, block_k=BLOCK_K, num_warps=4,
        )  # fmt: skip
    return out


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (Zhang & Sennrich 2019, arXiv:1910.07467) of the rows of x [..., K], summed in fp32."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    # sqrt(mean of squares + eps) is the length of the vector of the two roots: one operation.
    size = torch.hypot(size * x.shape[-1] ** -0.5, _number(eps**0.5, x.device))
    return torch.mul(x / size, weight, out=torch.empty_like(x))


@functools.cache
def _number(value: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, device=device)


@jit
def _rms_norm(out, x, weight, size, eps, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, block)
    a = tl.load(x + row * size + k, k < size, 0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(a * a) / size + eps)
    w = tl.load(weight + k, k < size, 0.0).to(tl.float32)
    tl.store(out + row * size + k, (a * scale * w).to(out.dtype.element_ty), k < size)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm_torch` as one Triton launch, a program for each row."""
    x = x.contiguous()
    out, size = torch.empty_like(x), x.shape[-1]
    if out.numel():
        block = triton.next_power_of_2(size)
        _rms_norm[(x.numel() // size,)](out, x, weight.contiguous(), size, eps, block=block, num_warps=4)
    return out
