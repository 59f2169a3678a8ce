"""Bytes: those that a pass reads of the weights, and the memory that decoding needs besides them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visar.engine.decoder import Decoder
from visar.engine.quantization import QuantizedLinear
from visar.errors import VisarError
from visar.host import available_memory

GIB = 2**30
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
    number = 4 if model.device.type == "cpu" else model.dtype.itemsize
    return batches * 2 * c.num_layers * c.dim * slots * number + COPIES * window * c.vocab_size * 4


def check_memory(each: int, batch: int, device: torch.device) -> None:
    """Raise `VisarError` where `batch` images of `each` bytes do not fit. The message says how many would."""
    free = free_memory(device)
    if each * batch > free:
        raise VisarError(
            f"{batch} images at once need about {each * batch / GIB:.1f} GiB besides the weights, and "
            f"{free / GIB:.1f} GiB are free on {device}; {free // each} would fit."
        )
