"""Bytes: those that a pass reads of the weights, and the memory that decoding needs besides them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from visar.engine.component import unfilled
from visar.engine.decoder import Decoder, kv_heads
from visar.engine.quantization import QuantizedLinear
from visar.errors import VisarError
from visar.host import available_memory
from visar.kernels.invariant import is_invariant

GIB = 2**30
M = TypeVar("M", bound=nn.Module)
COPIES = 12  # of a pass's logits in fp32: both batches of guidance, distributions of window and drafts, float64 sums


def streamed_bytes(*modules: nn.Module) -> int:
    """Bytes of the weights that a pass through the modules reads, in the dtype that they are stored in.

    A pass reads a few rows of an embedding, which are not counted, unless an output head shares the whole table.
    """
    read: dict[int, Tensor] = {}
    for part in (part for module in modules for part in module.modules() if not isinstance(part, nn.Embedding)):
        own = [*part.parameters(recurse=False), *([part.scale] if isinstance(part, QuantizedLinear) else [])]
        read |= {id(t): t for t in own}
    return sum(t.numel() * t.element_size() for t in read.values())


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated: on a GPU free memory and the allocator's reserve, else the system's."""
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    return available_memory()


def decoding_bytes(model: Decoder, batches: int, slots: int, window: int) -> int:
    """Estimated bytes of one image besides the weights: keys and values, and tensors of the size of logits.

    `batches` is 2 with guidance, else 1; `slots` are those of the cache.
    """
    c = model.config
    number = (8 if is_invariant() else 4) if model.device.type == "cpu" else model.dtype.itemsize
    cached = 2 * len(model.layers) * kv_heads(c) * model.head_dim * slots * number
    return batches * cached + COPIES * window * c.vocab_size * 4


def check_training(make: Callable[[], M], device: str) -> M:
    """The network that `make` gives. Raises `VisarError` before it is made, where there is not the memory to train it.

    That takes weights, gradients, a moving average, and the optimizer's two averages, each in fp32.
    """
    with unfilled():
        count = sum(p.numel() for p in make().parameters())
    needed = count * 4 * (5 if device == "cpu" else 1)  # on a GPU only the weights are made here
    if needed > (free := available_memory()):
        raise VisarError(
            f"A network of {count / 1e6:.0f} million weights needs {needed / GIB:.1f} GiB to train, and "
            f"{free / GIB:.1f} GiB are free; give smaller sizes."
        )
    return make()


def check_memory(each: int, batch: int, device: torch.device) -> None:
    """Raise `VisarError` where `batch` images of `each` bytes do not fit. The message says how many would."""
    free = free_memory(device)
    if each * batch > free:
        raise VisarError(
            f"{batch} images at once need about {each * batch / GIB:.1f} GiB besides the weights, and "
            f"{free / GIB:.1f} GiB are free on {device}; {free // each} would fit."
        )
