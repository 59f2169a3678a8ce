"""What a decoding takes beside the weights, and what is free: said before, and not by an allocator in the middle."""

from __future__ import annotations

import torch

from visar.engine.decoder import Decoder
from visar.errors import VisarError
from visar.host import available_memory

GIB = 2**30
COPIES = 12  # of a pass's logits in fp32: both batches of guidance, distributions of window and drafts, sums in float64


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated: what a GPU has left with its allocator's reserve; what the system could give."""
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    return available_memory()


def decoding_bytes(model: Decoder, batches: int, slots: int, window: int) -> int:
    """Bytes that one image takes besides the weights, estimated: keys and values, and what is made of the logits.

    `batches` is 2 with guidance, `slots` are those of the cache.
    """
    c = model.config
    number = 4 if model.device.type == "cpu" else model.dtype.itemsize
    return batches * 2 * c.num_layers * c.dim * slots * number + COPIES * window * c.vocab_size * 4


def check_memory(each: int, batch: int, device: torch.device) -> None:
    """Raise `VisarError` where `batch` images of `each` bytes do not fit; it says how many would."""
    free = free_memory(device)
    if each * batch > free:
        raise VisarError(
            f"{batch} images at once need about {each * batch / GIB:.1f} GiB beside the weights, and "
            f"{free / GIB:.1f} GiB are free on {device}; {free // each} would fit."
        )
