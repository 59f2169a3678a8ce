"""Every Triton kernel against its plain torch form on one device: the same numbers, their times, the bandwidth."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visar.engine.rng import Purpose
from visar.engine.tree import Tree
from visar.host import synchronize
from visar.kernels.aggregate import pool
from visar.kernels.attention import AttentionMetadata, decode_attention
from visar.kernels.backend import backend
from visar.kernels.noise import ExponentialNoise, exponential, uniforms
from visar.kernels.product import product_torch, product_triton, rms_norm_torch, rms_norm_triton
from visar.kernels.rotary_append import rotary_append
from visar.kernels.sample import sample, sample_gumbel
from visar.kernels.target_probs import guide, target_probs
from visar.kernels.verify import Rule, verify_triton
from visar.samplers import verification
from visar.samplers.verification import StepNoise


@dataclass(frozen=True)
class Sizes:
    """`rows` with both batches; `layers` caches are used in turn, so that none of them stays on the chip."""

    rows: int
    slots: int
    heads: int
    dim: int
    layers: int
    window: int
    vocab: int
    top_k: int


XL = Sizes(rows=2, slots=1040, heads=20, dim=64, layers=24, window=16, vocab=16384, top_k=1000)
TINY = Sizes(rows=2, slots=40, heads=2, dim=16, layers=2, window=4, vocab=96, top_k=10)


@dataclass(frozen=True)
class Case:
    """A kernel at work: `call(i)` is the i-th of some inputs of one shape, in whichever form the backend says.

    `reference` is called for the torch form where the kernel has no function that chooses. `moved`: bytes that it
    cannot but read or write. `tolerance`: how far numbers may differ; for tokens the share that may.
    """

    name: str
    call: Callable[[int], Any]
    moved: int
    tolerance: float
    reference: Callable[[int], Any] | None = None
    before: Callable[[int], Any] = lambda i: (
        None
    )  # so that a form that writes nothing cannot be told the other's result


@dataclass(frozen=True)
class Outcome:
    """Microseconds of both forms, GB/s of the kernel, and the largest difference (for tokens the share)."""

    name: str
    same: bool
    difference: float
    microseconds: float
    torch_microseconds: float
    gb_per_second: float


def cases(s: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The kernels at the sizes of a decoding pass."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, as_: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(as_)

    size, wide = dtype.itemsize, s.heads * s.dim
    batch = max(s.rows // 2, 1)
    keys, values = (normal(s.layers, s.rows, s.slots, s.heads, s.dim, as_=dtype) for _ in range(2))
    loose = 2e-2 if dtype != torch.float32 else 1e-4

    def attention(name: str, count: int, group: int = 1, **more: Any) -> Case:
        q = normal(s.rows, count, s.heads * group, s.dim, as_=dtype)
        root = torch.full((s.rows,), s.slots - count, device=device) - torch.arange(s.rows, device=device) % 2
        metadata = AttentionMetadata(root, **more)
        return Case(
            f"attention, {name}",
            lambda i: decode_attention(q, keys[i], values[i], metadata, s.slots),
            2 * s.rows * s.slots * wide * size,
            loose,
        )

    yield attention("one query", 1)
    yield attention(f"{s.window} queries", s.window)
    tree = Tree.of([-1] + [n // 2 for n in range(s.window - 1)]).to(device)
    yield attention(f"tree of {s.window}", s.window, ancestors=tree.ancestors)
    yield attention("8 heads to one of keys", s.window, group=8)
    yield attention("pseudo-key", 1, bias=torch.full((s.rows,), 3.0, device=device))

    qkv = normal(s.rows, s.window, 3 * s.heads, s.dim, as_=dtype)
    turns = normal(s.rows, s.window, s.dim // 2, 2)
    slots = torch.arange(s.window, device=device).expand(s.rows, -1) + 3

    def append(i: int) -> tuple[Tensor, ...]:
        return rotary_append(qkv, turns, keys[i], values[i], slots), keys[i, :, 3 : 3 + s.window], values[i, :, 3]

    yield Case(
        "rotary + cache append",
        append,
        6 * s.rows * s.window * wide * size,
        loose,
        before=lambda i: (keys[i].zero_(), values[i].zero_()),
    )

    cond, uncond = (normal(batch, s.window, s.vocab, as_=dtype) * 3 for _ in range(2))
    count = batch * s.window * s.vocab
    yield Case("guidance", lambda i: guide(cond, uncond, 4.0), count * (2 * size + 4), 1e-4)
    yield Case("top-k + softmax", lambda i: target_probs(cond, 1.0, s.top_k), count * (size + 4), 1e-4)
    yield Case("top-p + softmax", lambda i: target_probs(cond, 0.9, 0, 0.9), count * (size + 4), 1e-4)

    weight, scale = normal(3 * wide, wide, as_=dtype) * wide**-0.5, normal(wide, as_=dtype)
    rows = normal(s.rows * s.window, wide, as_=dtype)
    yield Case(
        "invariant product", lambda i: product_triton(rows, weight), weight.numel() * size, loose,
        lambda i: product_torch(rows, weight),
    )  # fmt: skip
    yield Case(
        "invariant norm", lambda i: rms_norm_triton(rows, scale, 1e-5), 2 * rows.numel() * size, loose,
        lambda i: rms_norm_torch(rows, scale, 1e-5),
    )  # fmt: skip

    key, images = torch.tensor([[1, 2]], device=device).expand(batch, 2), torch.arange(batch, device=device)
    at = torch.arange(s.window, device=device).expand(batch, -1)
    noise = (key, images, torch.zeros_like(images), at, 5, int(Purpose.STEP))
    yield Case("uniforms", lambda i: uniforms(*noise), 16 * batch * s.window, 0.0)
    yield Case("exponentials", lambda i: exponential(*noise, s.vocab), 4 * count, 1e-5)

    p, q = (target_probs(normal(batch, s.window, s.vocab) * 3, 1.0, s.top_k) for _ in range(2))
    q = q[:, :-1].contiguous()
    u, v = (torch.rand(batch, s.window, generator=generator, device=device, dtype=torch.float64) for _ in range(2))
    lazy = ExponentialNoise(*noise, s.vocab)
    yield Case("sample", lambda i: sample(p, u), 4 * count, 0.01)
    yield Case("Gumbel-max", lambda i: sample_gumbel(p, lazy), 4 * count, 0.01)

    # Neighbours of token t: those that follow it, so that none is the token itself.
    table = (torch.arange(s.vocab, device=device)[:, None] + torch.arange(1, s.top_k + 1, device=device)) % s.vocab
    yield Case(
        "pooling of neighbours", lambda i: pool(p[:, 0], p[:, 0].argmax(-1), table, 0.3, 0.0), 8 * batch * s.vocab, 1e-5
    )

    with backend("torch"):
        drafts = sample(q, u[:, 1:])
        step_noise = StepNoise(v, u, lazy.make())
    rules: dict[Rule, Callable[..., Any]] = {
        "independent": verification.verify_independent,
        "maximal": verification.verify_maximal,
        "gumbel": verification.verify_gumbel,
    }
    for name, rule in rules.items():
        own = functools.partial(verify_triton, name, p, q, drafts, v, u, lazy, verification.EQUAL)
        plain = functools.partial(rule, p, q, drafts, step_noise)
        yield Case(f"verification, {name}", _any(own), 4 * count, 0.01, _any(plain))


def _any(call: Callable[[], Any]) -> Callable[[int], Any]:
    """Of a kernel whose inputs are always the same."""
    return lambda i: tuple(call())


def run(case: Case, s: Sizes, device: torch.device, repeats: int) -> Outcome:
    """Compare both forms on all inputs, then time them."""
    off = 0.0
    for i in range(s.layers):
        case.before(i)
        with backend("torch"):
            expected = _tensors((case.reference or case.call)(i))
        case.before(i)
        with backend("triton"):
            got = _tensors(case.call(i))
        off = max(off, *(_difference(a, b) for a, b in zip(expected, got, strict=True)))
    with backend("torch"):
        plain = _microseconds(case.reference or case.call, s.layers, device, repeats)
    with backend("triton"):
        own = _microseconds(case.call, s.layers, device, repeats)
    return Outcome(case.name, off <= case.tolerance, off, own, plain, case.moved / own / 1e3)


def _tensors(result: Any) -> list[Tensor]:
    return [t.clone() for t in result] if isinstance(result, tuple) else [result]


def _difference(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    if not a.is_floating_point():
        return (a != b).double().mean().item()
    off = (a.double() - b.double()).abs() / a.double().abs().clamp_min(1.0)
    return float("inf") if off.isnan().any() else off.max().item()


def _microseconds(call: Callable[[int], Any], inputs: int, device: torch.device, repeats: int) -> float:
    """Of a call among many, as the device works them off; on a GPU replayed from a graph, which leaves out launches."""
    if device.type != "cuda":
        start = time.perf_counter()
        for n in range(repeats):
            call(n % inputs)
        return (time.perf_counter() - start) / repeats * 1e6
    call(0)
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for i in range(inputs):
                call(i)
        replay: Callable[[], Any] = graph.replay
    except RuntimeError:  # code that reads from the device cannot be captured

        def replay() -> None:
            for i in range(inputs):
                call(i)

    replay()
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    for _ in range(repeats):
        replay()
    end_event.record()
    synchronize(device)
    return start_event.elapsed_time(end_event) * 1e3 / repeats / inputs
