"""Which of a kernel's two forms runs: Triton where there is a GPU that it can drive, plain torch everywhere else.

Kernel files take `triton`, `tl` and `jit` from here, so that they can be imported where there is no Triton; their
Triton forms are then never called.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch brings it for GPUs on Linux and Windows only
    triton = tl = None

Backend = Literal["auto", "torch", "triton"]
_chosen: Backend = "auto"


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function as it is where there is no Triton."""
    return function if triton is None else triton.jit(function)


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Within it all kernels run in this form: "torch", "triton" (on a CPU under TRITON_INTERPRET=1), or "auto"."""
    global _chosen
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def use_triton(x: Tensor) -> bool:
    """Whether a kernel over tensors like `x`, on its device, runs as Triton. Gradients pass through torch alone."""
    if x.requires_grad and torch.is_grad_enabled():
        return False
    if _chosen != "auto":
        return _chosen == "triton"
    if not x.is_cuda:
        return False
    if triton is None:
        say_once("Triton is not installed; kernels run in plain torch, which is slower.")
    return triton is not None


@functools.cache
def say_once(text: str) -> None:
    """Log one line, once."""
    logging.getLogger("visar").warning(text)
