"""The invariant mode: the numbers of a position do not depend on how many others are computed with it, bit for bit.

Libraries choose the order of a sum by the shape of the whole product, and bfloat16 rounds what differs in the last bits
to another number: then a pass of 16 tokens and a pass of one have different distributions. Nothing of it is random.
Within `invariant()` a row of a product has the same bits in any batch and window:

- on a CPU a product runs at row counts that were compared on this machine (`by_rows`), and attention in float64, where
  sums in any order agree before they are rounded (`visar.kernels.attention`);
- on a GPU products, norms and attention are Triton kernels whose order of sums is fixed (He et al. 2025, "Defeating
  Nondeterminism in LLM Inference").
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from visar.kernels.backend import use_triton
from visar.kernels.derived import steady_weights
from visar.kernels.linear import Form, linear_form, pinned_form
from visar.kernels.product import product_triton

_on: ContextVar[bool] = ContextVar("invariant", default=False)
# Rows [M, K], a weight [N, K] and other rows [M, N], for products that go on with them, to [M, N].
Product = Callable[[Tensor, Tensor, Tensor], Tensor]
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)  # row counts to run products at; of more rows 128 at a time
DISTINCT = 64  # rows of the weight that products are compared with


@contextmanager
def invariant(on: bool = True) -> Iterator[None]:
    """Within it, in this thread, kernels are invariant; sessions must be made and used within it.

    No weight may change meanwhile, as in `steady_weights`.
    """
    token = _on.set(on)
    try:
        with ExitStack() as stack:
            if on:  # one form for any number of rows
                stack.enter_context(steady_weights())
                stack.enter_context(linear_form("packed"))
            yield
    finally:
        _on.reset(token)


def is_invariant() -> bool:
    """Whether this thread is within `invariant()`."""
    return _on.get()


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] @ weight [N, K], by the library; in the invariant mode rows do not depend on M."""
    if not is_invariant():
        return F.linear(x, weight)
    if use_triton(x):
        return product_triton(x, weight)
    return by_rows(_plain, weight, lambda rows: F.linear(rows, weight), x)


def _plain(x: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    return F.linear(x, weight)


def by_rows(kind: Product, weight: Tensor, form: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """form(*tensors) of tensors [M, ...], on a CPU: padded or split to row counts at which all rows have equal bits.

    `form` is the product `kind` of the first tensor with a weight like `weight`, and perhaps more, row by row.
    """
    assert tensors[0] is not None
    rows, steps = len(tensors[0]), row_counts(kind, weight)
    if rows > (most := steps[-1]):
        parts = zip(*([None] * -(-rows // most) if t is None else t.split(most) for t in tensors), strict=True)
        return torch.cat([by_rows(kind, weight, form, *part) for part in parts])
    more = next(n for n in steps if n >= rows) - rows
    if not more:
        return form(*tensors)
    return form(*(t if t is None else F.pad(t, (0, 0, 0, more)) for t in tensors))[:rows]


def row_counts(kind: Product, weight: Tensor) -> tuple[int, ...]:
    """The row counts at which `kind` gives a row the same bits with a weight like this one."""
    threads = torch.get_num_threads()
    return agreeing_rows(kind, *weight.shape, weight.dtype, weight.is_inference(), threads, pinned_form())


@functools.cache
def agreeing_rows(
    kind: Product, outputs: int, inputs: int, dtype: torch.dtype, inference: bool, threads: int, form: Form
) -> tuple[int, ...]:
    """The counts in `ROWS` at which `kind` gives a row the same bits, in whatever place, as measured here once for the
    `form` of products that is in use.

    Half of the sums that it measures with are zero but for their rounding, so that any other order shows in every
    output, even in bfloat16; the others show what is rounded twice. What goes on with the product is once as large as
    the sums, and once so small that it hides nothing. Where row counts form several groups, that of the largest is
    taken; (1,) if none is uniform.
    """
    generator = torch.Generator().manual_seed(0)
    found: list[tuple[int, Tensor]] = []
    with torch.inference_mode(inference), torch.no_grad():  # `linear` has no second copy of a weight made in that mode
        half = inputs // 2
        x = torch.randn(1, inputs, generator=generator) * 2.0 ** torch.randint(-6, 7, (1, inputs), generator=generator)
        w = torch.randn(min(outputs, DISTINCT), inputs, generator=generator)
        other = (torch.randn(1, outputs, generator=generator) * x.norm()).to(dtype)
        others = other, torch.full_like(other, 2.0**-20)
        mixed = torch.randperm(half, generator=generator)
        x[:, half : 2 * half], w[::2, half : 2 * half] = x[:, mixed], -w[::2, mixed]
        w[::2, 2 * half :] = 0
        w = w.repeat(-(-outputs // len(w)), 1)[:outputs].to(dtype).contiguous()
        for n in ROWS:
            y = torch.cat([kind(x.to(dtype).repeat(n, 1), w, o.repeat(n, 1)) for o in others], dim=1)
            if torch.equal(y, y[:1].expand_as(y)):
                found.append((n, y[0]))
    return tuple(n for n, y in found if torch.equal(y, found[-1][1])) or (1,)
