"""What a decoding takes beside the weights, and what is free: said before, and not by an allocator in the middle."""

from __future__ import annotations

import torch

from visar.errors import VisarError
from visar.families.llamagen.gpt import LlamaGen
from visar.host import available_memory

GIB = 2**30
LAWS = 12  # copies of a pass's logits in fp32: both halves, guided, laws of window and drafts, sums in float64


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated: what a GPU has left with its allocator's reserve; what the system could give."""
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    return available_memory()


def decoding_bytes(model: LlamaGen, halves: int, length: int, window: int) -> int:
    """Bytes that one image takes beside the weights, estimated: keys and values, and what is made of the logits."""
    c = model.config
    number = 4 if model.device.type == "cpu" else model.dtype.itemsize
    slots = min(c.condition_length, 2) + length + window
    return halves * 2 * c.num_layers * c.dim * slots * number + LAWS * window * c.vocab_size * 4


def check_memory(each: int, batch: int, device: torch.device) -> None:
    """Raise `VisarError` where `batch` images of `each` bytes do not fit; it says how many would."""
    free = free_memory(device)
    if each * batch > free:
        raise VisarError(
            f"{batch} images at once need about {each * batch / GIB:.1f} GiB beside the weights, and "
            f"{free / GIB:.1f} GiB are free on {device}; {free // each} would fit."
        )
