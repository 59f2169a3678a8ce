"""The library's noise (`visar.engine.rng`) from its counters: words of Philox, uniforms, and exponential noise.

A Triton form makes all of it in one launch. An `ExponentialNoise` says which Exp(1) variables are meant without making
them, so that a kernel that needs one per token of a vocabulary computes them in registers (`exponentials`) instead of
reading them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from visar.kernels.backend import jit, tl, use_triton
from visar.kernels.philox import Words, philox, philox_rounds

SPAN = 2**16  # positions, and passes


def words(
    key: Tensor, images: Tensor, keys: Tensor, positions: Tensor, passes: Tensor | int, purpose: int, lane: Tensor | int
) -> Words:
    """Four words of 32 random bits for each of `positions` [B, ...], for rows `images` [B] with the `keys` [B].

    `passes` and `lane` are numbers or broadcast with the positions; `key` [B, 2] are the rows' seeds. The counter
    holds the lower half of a row's key of 64 bits; the upper half goes into the seed.
    """
    ones = (1,) * (positions.ndim - 1)
    image, own = images.view(-1, *ones), keys.view(-1, *ones)
    low, high = key.t().reshape(2, -1, *ones)
    key = torch.stack(torch.broadcast_tensors(low, high ^ (own >> 32 & 0xFFFFFFFF)))
    zero = torch.zeros_like(positions)
    at = positions + (own % SPAN) * SPAN
    turn = zero + passes + (own // SPAN % SPAN) * SPAN
    return philox(key, (zero + lane, at, turn, zero + image * 256 + purpose))


def uniforms(
    key: Tensor,
    images: Tensor,
    keys: Tensor,
    positions: Tensor,
    passes: Tensor | int,
    purpose: int,
    trial: Tensor | int = 0,
) -> tuple[Tensor, Tensor]:
    """Two independent uniforms for each of `positions` [B, W], float64, of 52 bits, never 0 and never 1."""
    form = uniforms_triton if use_triton(positions) else uniforms_torch
    return form(key, images, keys, positions, passes, purpose, trial)


def uniforms_torch(
    key: Tensor,
    images: Tensor,
    keys: Tensor,
    positions: Tensor,
    passes: Tensor | int,
    purpose: int,
    trial: Tensor | int = 0,
) -> tuple[Tensor, Tensor]:
    a, b, c, d = words(key, images, keys, positions, passes, purpose, trial)
    one, two = (((high << 20 | low >> 12).double() + 0.5) * 2.0**-52 for high, low in ((a, b), (c, d)))
    return one, two


def uniforms_triton(
    key: Tensor,
    images: Tensor,
    keys: Tensor,
    positions: Tensor,
    passes: Tensor | int,
    purpose: int,
    trial: Tensor | int = 0,
) -> tuple[Tensor, Tensor]:
    """`uniforms_torch` as one launch, bit for bit."""
    shape = torch.broadcast_shapes(positions.shape, (len(images), *(1,) * (positions.ndim - 1)))
    flat = (shape[0], shape[1:].numel())
    at = positions.expand(shape).reshape(flat)
    images, keys, key = images.expand(flat[0]), keys.expand(flat[0]), key.expand(flat[0], 2)
    (turn, turn_steps), (lane, lane_steps) = (
        (x.expand(shape).reshape(flat), x.expand(shape).reshape(flat).stride())
        if isinstance(x, Tensor)
        else (x, (0, 0))
        for x in (passes, trial)
    )
    out = torch.empty(2, *shape, dtype=torch.float64, device=positions.device)
    size = flat[0] * flat[1]
    _uniforms[((size + 127) // 128,)](
        out, key, images, keys, at, turn, lane, size, flat[1], images.stride(0), keys.stride(0), key.stride(0),
        *at.stride(), *turn_steps, *lane_steps, purpose=int(purpose), turn_read=isinstance(turn, Tensor),
        lane_read=isinstance(lane, Tensor), block=128,
    )  # fmt: skip
    return out[0], out[1]


def exponential(
    key: Tensor, images: Tensor, keys: Tensor, positions: Tensor, passes: Tensor | int, purpose: int, vocab: int
) -> Tensor:
    """Exp(1) variables [B, W, vocab], fp32, for positions [B, W]; `passes` is a number, or [B, 1]."""
    form = exponential_triton if use_triton(positions) else exponential_torch
    return form(key, images, keys, positions, passes, purpose, vocab)


def exponential_torch(
    key: Tensor, images: Tensor, keys: Tensor, positions: Tensor, passes: Tensor | int, purpose: int, vocab: int
) -> Tensor:
    lanes = torch.arange((vocab + 3) // 4, device=positions.device)
    spread = positions[..., None].expand(*positions.shape, lanes.shape[-1])
    turns = passes[..., None] if isinstance(passes, Tensor) else passes
    w = torch.stack(words(key, images, keys, spread, turns, purpose, lanes), -1).flatten(-2)[..., :vocab]
    u = ((w.double() + 0.5) * 2.0**-32).float()
    return -torch.log1p(-u.clamp_max(1 - 2.0**-24))


def exponential_triton(
    key: Tensor, images: Tensor, keys: Tensor, positions: Tensor, passes: Tensor | int, purpose: int, vocab: int
) -> Tensor:
    """`exponential_torch` as one launch, from the same words; the logarithm may differ in its last bits."""
    lazy = ExponentialNoise(key, images, keys, positions, passes, purpose, vocab)
    out = torch.empty(*positions.shape, vocab, device=positions.device)
    _exponential[(positions.numel(), (vocab + 1023) // 1024)](
        out, *lazy.arguments(), vocab, positions.shape[1], **lazy.constants(), block=1024
    )
    return out


@dataclass(frozen=True)
class ExponentialNoise:
    """Exp(1) variables e [B, W, vocab] that are not made yet: argmax p/e over the tokens is a sample from p.

    The fields are the arguments of `exponential`, `positions` being [B, W] and `passes` a number or [B, 1].
    """

    key: Tensor
    images: Tensor
    keys: Tensor
    positions: Tensor
    passes: Tensor | int
    purpose: int
    vocab: int

    def make(self) -> Tensor:
        """The variables, [B, W, vocab]."""
        return exponential(self.key, self.images, self.keys, self.positions, self.passes, self.purpose, self.vocab)

    def __getitem__(self, at: tuple[slice, slice]) -> ExponentialNoise:
        """The noise of some columns, `noise[:, 1:]`."""
        return replace(self, positions=self.positions[at])

    def arguments(self) -> tuple[Any, ...]:
        """What a kernel is given to make them: the arguments of `noise_counter`."""
        rows = len(self.positions)  # a kernel reads as many of each
        images, keys, key = self.images.expand(rows), self.keys.expand(rows), self.key.expand(rows, 2)
        return (
            key, images, keys, self.positions, self.passes, images.stride(0), keys.stride(0), key.stride(0),
            *self.positions.stride(),
            self.passes.stride(0) if isinstance(self.passes, Tensor) else 0,
        )  # fmt: skip

    def constants(self) -> dict[str, Any]:
        return dict(purpose=int(self.purpose), turn_read=isinstance(self.passes, Tensor))


@jit
def counter(image, own, position, turn, purpose: tl.constexpr):  # type: ignore[no-untyped-def]
    """The words 1 to 3 of a counter, uint32."""
    c1 = position + (own & 0xFFFF) * 65536
    c2 = turn + (own >> 16 & 0xFFFF) * 65536
    return c1.to(tl.uint32), c2.to(tl.uint32), (image * 256 + purpose).to(tl.uint32)


@jit
def keyed(word, own):  # type: ignore[no-untyped-def]
    """The second word of the seed with the upper half of a row's key, uint32."""
    return (word ^ (own >> 32 & 0xFFFFFFFF)).to(tl.uint32)


@jit
def noise_counter(  # type: ignore[no-untyped-def]
    key, images, keys, positions, passes, image_step, key_step, seed_step, row_step, column_step, turn_step, row,
    column, purpose: tl.constexpr, turn_read: tl.constexpr,
):  # fmt: skip
    """Counter words 1 to 3 and the two words of the seed, for one position of an `ExponentialNoise`; all scalars."""
    own = tl.load(keys + row * key_step)
    turn = passes
    if turn_read:
        turn = tl.load(passes + row * turn_step)
    position = tl.load(positions + row * row_step + column * column_step)
    c1, c2, c3 = counter(tl.load(images + row * image_step), own, position, turn, purpose)
    key += row * seed_step
    return c1, c2, c3, tl.load(key).to(tl.uint32), keyed(tl.load(key + 1), own)


@jit
def exponentials(first, c1, c2, c3, k0, k1, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Exp(1) variables [block], fp32, of the tokens first.. of a position; `first` and `block` are multiples of 4."""
    c0 = (first // 4 + tl.arange(0, block // 4)).to(tl.uint32)
    zero = c0 ^ c0
    a, b, c, d = philox_rounds(c0, zero + c1, zero + c2, zero + c3, zero + k0, zero + k1)
    w = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))  # a0 b0 c0 d0 a1 ...
    # (w + 1/2) / 2**32, rounded once, without float64
    u = (w.to(tl.int64) * 2 + 1).to(tl.float32) * 1.1641532182693481e-10
    u = tl.minimum(u, 0.999999940395355224609375)
    # -log1p(-u): the quotient makes good what is rounded off in 1 - u, which for small u is all of it
    x = 1.0 - u
    return tl.where(x == 1.0, u, tl.log(x) * (u / tl.where(x == 1.0, -1.0, x - 1.0)))


@jit
def _uniforms(  # type: ignore[no-untyped-def]
    out, key, images, keys, positions, passes, trial, size, width, image_step, key_step, seed_step, row_step,
    column_step, turn_row, turn_column, lane_row, lane_column, purpose: tl.constexpr, turn_read: tl.constexpr,
    lane_read: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < size
    row, column = at // width, at % width
    zero = tl.zeros_like(at)
    turn = zero + passes if not turn_read else tl.load(passes + row * turn_row + column * turn_column, inside, 0)
    lane = zero + trial if not lane_read else tl.load(trial + row * lane_row + column * lane_column, inside, 0)
    position = tl.load(positions + row * row_step + column * column_step, inside, 0)
    image, own = tl.load(images + row * image_step, inside, 0), tl.load(keys + row * key_step, inside, 0)
    c1, c2, c3 = counter(image, own, position, turn, purpose)
    key += row * seed_step
    k0, k1 = tl.load(key, inside, 0).to(tl.uint32), keyed(tl.load(key + 1, inside, 0), own)
    a, b, c, d = philox_rounds(lane.to(tl.uint32), c1, c2, c3, k0, k1)
    tl.store(out + at, _unit(a, b), inside)
    tl.store(out + size + at, _unit(c, d), inside)


@jit
def _unit(high, low):  # type: ignore[no-untyped-def]
    return ((high.to(tl.int64) << 20 | low.to(tl.int64) >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16


@jit
def _exponential(  # type: ignore[no-untyped-def]
    out, key, images, keys, positions, passes, image_step, key_step, seed_step, row_step, column_step, turn_step, vocab,
    width, purpose: tl.constexpr, turn_read: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    c1, c2, c3, k0, k1 = noise_counter(
        key, images, keys, positions, passes, image_step, key_step, seed_step, row_step, column_step, turn_step,
        program // width, program % width, purpose, turn_read,
    )  # fmt: skip
    first = tl.program_id(1) * block
    at = first + tl.arange(0, block)
    tl.store(out + program.to(tl.int64) * vocab + at, exponentials(first, c1, c2, c3, k0, k1, block), at < vocab)
