"""Philox4x32-10, the counter-based generator of Salmon et al. (SC 2011): torch, numpy for the CPU, and a Triton kernel.

Counter-based means that a random word is a pure function of (key, counter). All versions give the same bits, so noise
made inside a fused kernel equals noise made by the library, and no call order can change an image.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from visar.kernels.backend import jit, tl

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(key: Tensor, counter: Words) -> Words:
    """Four words of 32 random bits, each int64 in [0, 2**32), for four int64 counter tensors [...].

    `key` [2], int64, holds two words of 32 bits; or it is [2, ...], with as many dimensions as the counters and of
    sizes that broadcast with theirs. It is a tensor so that a captured graph can be given another seed.
    """
    return philox_numpy(key, counter) if counter[0].device.type == "cpu" else philox_torch(key, counter)


def philox_numpy(key: Tensor, counter: Words) -> Words:
    """`philox` on a CPU: a pass asks for few words, and numpy's operations on small arrays are the quicker ones."""
    c = np.stack(np.broadcast_arrays(*(x.numpy() for x in counter))).view(np.uint64)
    even, odd = c[::2], c[1::2]
    ones = (1,) * (c.ndim - 1)
    k = key.numpy().view(np.uint64)
    k = k.reshape(2, *ones) if k.ndim == 1 else k
    multipliers, steps = (np.array(x, dtype=np.uint64).reshape(2, *ones) for x in (_MULTIPLIERS, _KEY_STEPS))
    mask, half = np.uint64(_MASK), np.uint64(32)
    for _ in range(10):
        swapped = (even * multipliers)[::-1]
        even = swapped >> half
        even ^= odd
        even ^= k
        odd = swapped & mask
        k = (k + steps) & mask
    c0, c2, c1, c3 = (torch.from_numpy(x.view(np.int64)) for x in (*even, *odd))
    return c0, c1, c2, c3


def philox_torch(key: Tensor, counter: Words) -> Words:
    """`philox` in torch, on any device."""
    k0, k1 = key.unbind()
    c0, c1, c2, c3 = counter
    for _ in range(10):
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # the products wrap, their bits are right
        c0, c1, c2, c3 = (b >> 32 & _MASK) ^ c1 ^ k0, b & _MASK, (a >> 32 & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


@jit
def philox_rounds(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Four words for counters and keys, all uint32; for use inside other kernels."""
    for _ in tl.static_range(10):
        high_a, low_a = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high_b, low_b = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@jit
def _fill(out, counters, key, size, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < size
    c0 = tl.load(counters + at, inside, 0).to(tl.uint32)
    c1 = tl.load(counters + size + at, inside, 0).to(tl.uint32)
    c2 = tl.load(counters + 2 * size + at, inside, 0).to(tl.uint32)
    c3 = tl.load(counters + 3 * size + at, inside, 0).to(tl.uint32)
    k0 = tl.load(key + tl.zeros_like(at)).to(tl.uint32)
    k1 = tl.load(key + 1 + tl.zeros_like(at)).to(tl.uint32)
    c0, c1, c2, c3 = philox_rounds(c0, c1, c2, c3, k0, k1)
    tl.store(out + at, c0.to(tl.int64), inside)
    tl.store(out + size + at, c1.to(tl.int64), inside)
    tl.store(out + 2 * size + at, c2.to(tl.int64), inside)
    tl.store(out + 3 * size + at, c3.to(tl.int64), inside)


def philox_triton(key: Tensor, counter: Words, block: int = 256) -> Words:
    """`philox` as one Triton launch, bit for bit; runs on a GPU, or on the CPU under TRITON_INTERPRET=1."""
    counters = torch.stack([c.contiguous() for c in torch.broadcast_tensors(*counter)])
    out = torch.empty_like(counters)
    size = counters[0].numel()
    _fill[((size + block - 1) // block,)](out, counters, key, size, block=block)
    return tuple(out)  # type: ignore[return-value]
