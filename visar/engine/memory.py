"""Memory that decoding needs besides the weights, checked before it starts."""

from __future__ import annotations

import torch

from visar.engine.decoder import Decoder
from visar.errors import VisarError
from visar.host import available_memory
from visar.kernels.invariant import is_invariant

GIB = 2**30
COPIES = 12  # of a pass's logits in fp32: both batches of guidance, distributions of window and drafts, float64 sums


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
    return batches * 2 * c.num_layers * c.dim * slots * number + COPIES * window * c.vocab_size * 4


def check_memory(each: int, batch: int, device: torch.device) -> None:
    """Raise `VisarError` where `batch` images of `each` bytes do not fit. The message says how many would."""
    free = free_memory(device)
    if each * batch > free:
        raise VisarError(
            f"{batch} images at once need about {each * batch / GIB:.1f} GiB besides the weights, and "
            f"{free / GIB:.1f} GiB are free on {device}; {free // each} would fit."
        )
