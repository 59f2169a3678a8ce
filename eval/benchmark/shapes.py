"""The time of a pass of a published shape: `visar bench --shapes`. Weights are random, and every result says so.

A pass is timed in the middle of an image, where the cache has its mean length, so that its time by the number of
passes is that of an image. It is compared with the bytes that it must read (weights without embedding tables,
keys and values of what is committed) and against the eager loop that is published, at the same shape.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from visar.engine.component import unfilled
from visar.engine.graphs import Graph
from visar.engine.guidance import Guidance
from visar.engine.memory import GIB, free_memory
from visar.engine.rng import Noise
from visar.errors import VisarError, unknown
from visar.eval.benchmark.eager_loop import EagerLoop, sample_tokens
from visar.eval.benchmark.profiling import PassProfile, profile_passes, profile_text
from visar.eval.benchmark.speed import bandwidth, device_title
from visar.eval.benchmark.steady import Steady, steady
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.session import LlamaGenSession
from visar.families.llamagen.specs import MODELS, GPTShape
from visar.host import synchronize
from visar.kernels.invariant import is_invariant
from visar.samplers import Autoregressive, Sampler, SpeculativeJacobi, Target
from visar.tables import table

MOST_WINDOW = 128
WINDOWS = (1, 16, 32, 64)


@dataclass(frozen=True)
class Shape:
    """A GPT, the side of its images in tokens, and the settings that the authors recommend."""

    name: str
    gpt: GPTShape
    condition: Literal["class", "text"]
    grid: int
    guidance: float
    top_k: int

    @property
    def weights(self) -> int:
        """Weights that every pass reads: layers, last norm and output head."""
        g = self.gpt
        return g.layers * (4 * g.dim**2 + 3 * g.dim * g.ffn + 2 * g.dim) + g.dim + g.vocab * g.dim

    @property
    def parameters(self) -> int:
        """All numbers of the model, those of its embeddings and buffers too."""
        g = self.gpt
        condition = (g.classes + 1) * g.dim
        if self.condition == "text":
            condition = (g.caption_features + g.dim) * g.dim + g.condition_length * g.caption_features
        return self.weights + g.vocab * g.dim + condition

    def cache(self, rows: int, slots: int) -> int:
        """Numbers of keys and values."""
        return 2 * self.gpt.layers * self.gpt.dim * rows * slots

    def streamed(self, batch: int, dtype: torch.dtype) -> int:
        """Bytes that a pass must read: weights, and keys and values of both batches for half an image after one
        condition slot.

        A caption's slots have keys that are all zero, and so count as one, which is exact.
        """
        return (self.weights + self.cache(2 * batch, 1 + self.grid**2 // 2)) * dtype.itemsize

    def needed(self, batch: int, window: int, dtype: torch.dtype, device: torch.device) -> int:
        """Bytes that measuring it takes, estimated: weights, cache, and what is made of the logits.

        On a CPU linear layers have a second copy of their weights, in the order in which it reads them.
        """
        copies = 2 if device.type == "cpu" else 1
        slots = self.gpt.condition_length + self.grid**2 + window
        weights = (self.parameters + (copies - 1) * self.weights) * dtype.itemsize
        probs = 12 * batch * window * self.gpt.vocab * 4  # both batches, guided, two distributions, sums in float64
        return weights + self.cache(2 * batch, slots) * dtype.itemsize + probs


def _published() -> dict[str, Shape]:
    shapes = {}
    for spec in MODELS.values():
        if spec.shape is None:
            continue
        size = spec.name.rsplit("-", 1)[1].upper()
        for pixels in spec.pixels:
            name = f"{size}-{pixels}"
            shapes[name] = Shape(name, spec.shape, spec.condition, pixels // spec.downsample, spec.guidance, spec.top_k)
    return shapes


SHAPES = _published()  # XL-256 and XL-512 are the text model, all others take classes
DEFAULTS = {"cuda": ("L-384", "XL-384", "XL-512", "3B-384"), "cpu": ("B-256", "L-256")}
BATCHES = {"cuda": (1, 8), "cpu": (1,)}
DTYPES = {"cuda": (torch.bfloat16,), "cpu": (torch.bfloat16, torch.float32)}


@dataclass(frozen=True)
class ShapeRow:
    """One shape with random weights at one batch and dtype; times are medians, by window.

    `streamed_gb`: the bytes that a pass must read, in 10**9; `of_bandwidth`: that over the time and over the bandwidth
    of a copy; `seconds_per_image`: of plain decoding, a pass by the number of tokens over the batch; `eager_ms`: a
    token of the published eager loop. `peak_gib` and `capture_seconds` are a GPU's, the latter where a graph was
    captured. A row with a `note` was not measured.
    """

    name: str
    batch: int
    dtype: str
    tokens: int
    needed_gib: float
    streamed_gb: float
    ms_per_pass: dict[int, float] = field(default_factory=dict)
    of_bandwidth: dict[int, float] = field(default_factory=dict)
    seconds_per_image: float | None = None
    eager_ms: float | None = None
    eager_ratio: float | None = None
    peak_gib: float | None = None
    capture_seconds: dict[int, float] = field(default_factory=dict)
    profiles: dict[int, PassProfile] = field(default_factory=dict)
    note: str = ""
    weights: str = "random"


@dataclass(frozen=True)
class ShapeReport:
    """`bandwidth` in GB/s, read and write, of a large copy in the same run."""

    device: str
    torch: str
    threads: int
    repeats: int
    bandwidth: float
    rows: list[ShapeRow]
    weights: str = "random"
    invariant: bool = False


def shape_named(name: str) -> Shape:
    """The shape of a name such as "XL-384", in capitals or not; a `VisarError` if there is none."""
    known = {n.lower(): s for n, s in SHAPES.items()}
    if name.lower() not in known:
        raise unknown("shape", name, SHAPES)
    return known[name.lower()]


def random_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> LlamaGen:
    """A model of random weights, made in its dtype on its device, without a copy in another."""
    g, before = shape.gpt, torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with unfilled():
            model = LlamaGen(
                g.vocab, g.dim, g.layers, g.heads, g.ffn, shape.condition, g.condition_length, g.classes,
                g.caption_features, shape.grid,
            )  # fmt: skip
    finally:
        torch.set_default_dtype(before)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for t in (*model.parameters(), *model.buffers()):
        # Spreads of trained models, so that nothing overflows and distributions are neither flat nor certain.
        t.fill_(1.0) if t.ndim == 1 else t.uniform_(-0.035, 0.035, generator=generator)
    return model


def measure(
    shapes: Sequence[Shape] | None = None,
    *,
    batches: Sequence[int] | None = None,
    windows: Sequence[int] = WINDOWS,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | str = "cpu",
    repeats: int = 3,
    passes: int | None = None,
) -> ShapeReport:
    """Time passes of `shapes`, by default those that suit the device, of which some may not fit and say so.

    `windows` begin with 1, plain decoding; `passes` are timed at once (24 on a GPU, 8 on a CPU), `repeats` times.
    Raises `VisarError` for numbers out of range, and for a shape of yours that does not fit.
    """
    device, asked = torch.device(device), shapes is not None
    if bad := [n for n in batches or () if n < 1]:
        raise VisarError(f"--batch must be 1 or more, not {bad[0]}.")
    if bad := [w for w in windows if not 1 <= w <= MOST_WINDOW]:
        raise VisarError(f"A pass takes 1 to {MOST_WINDOW} tokens, not {bad[0]}.")
    if repeats < 1:
        raise VisarError(f"--repeats must be 1 or more, not {repeats}.")
    windows = sorted({1, *windows})
    shapes = [SHAPES[n] for n in DEFAULTS[device.type]] if shapes is None else list(shapes)
    wanted = [
        (shape, batch, dtype)
        for shape in shapes
        for batch in batches or BATCHES[device.type]
        for dtype in dtypes or DTYPES[device.type]
    ]
    free = free_memory(device)
    for shape, batch, dtype in wanted:
        if asked and (problem := _problem(shape, batch, windows[-1], dtype, device, free)):
            raise VisarError(problem)
    peak = bandwidth(device)
    rows = []
    for shape, batch, dtype in wanted:
        lacks = _problem(shape, batch, windows[-1], dtype, device, free_memory(device))
        row = _plain_row(shape, batch, windows[-1], dtype, device, note=lacks)
        rows.append(row if lacks else _measured(row, shape, windows, dtype, device, repeats, passes, peak))
    return ShapeReport(
        device_title(device), torch.__version__, torch.get_num_threads(), repeats, peak, rows, invariant=is_invariant()
    )


def _problem(shape: Shape, batch: int, window: int, dtype: torch.dtype, device: torch.device, free: int) -> str:
    """Why a shape does not fit into `free` bytes and what would, or nothing."""
    needed = shape.needed(batch, window, dtype, device)
    if needed <= free:
        return ""
    fits = [b for b in range(1, batch) if shape.needed(b, window, dtype, device) <= free]
    smaller = [s.name for s in SHAPES.values() if s.needed(1, window, dtype, device) <= free]
    rest = f"batch {fits[-1]} fits" if fits else f"what fits: {', '.join(smaller) or 'no published shape'}"
    kind = str(dtype).removeprefix("torch.")
    return (
        f"{shape.name} at batch {batch} in {kind} needs {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free on "
        f"{device.type}; {rest}."
    )


def _plain_row(
    shape: Shape, batch: int, window: int, dtype: torch.dtype, device: torch.device, **more: Any
) -> ShapeRow:
    needed, streamed = shape.needed(batch, window, dtype, device) / GIB, shape.streamed(batch, dtype) / 1e9
    return ShapeRow(shape.name, batch, str(dtype).removeprefix("torch."), shape.grid**2, needed, streamed, **more)


def condition_of(shape: Shape, batch: int) -> tuple[Tensor, Tensor | None]:
    """Classes, or random caption features of which the last third is no padding, with their mask."""
    g = shape.gpt
    if shape.condition == "class":
        return torch.arange(batch) * 37 % g.classes, None
    mask = torch.zeros(batch, g.condition_length, dtype=torch.bool)
    mask[:, -(-g.condition_length * 2 // 3) :] = True
    features = torch.randn(batch, g.condition_length, g.caption_features, generator=torch.Generator().manual_seed(0))
    return features * mask[..., None], mask


def sampler_of(window: int) -> Sampler:
    """Plain decoding, or coupled speculative Jacobi decoding in a window."""
    return Autoregressive() if window == 1 else SpeculativeJacobi(window=window, coupling="maximal")


def eager_ms(model: LlamaGen, shape: Shape, batch: int, passes: int) -> float:
    """Milliseconds per token of the published eager loop in the middle of an image, sampling included."""
    condition, mask = condition_of(shape, batch)
    loop = EagerLoop(model, condition, mask, length=shape.grid**2, grid=shape.grid, guidance=Guidance(shape.guidance))
    loop.skip_to(shape.grid**2 // 2)
    tokens = torch.zeros(batch, dtype=torch.long, device=model.device)

    @torch.inference_mode()
    def run(count: int) -> None:
        nonlocal tokens
        for _ in range(count):
            tokens = sample_tokens(loop.step(tokens), 1.0, shape.top_k)
        synchronize(model.device)

    run(2)
    start = time.perf_counter()
    run(passes)
    return 1e3 * (time.perf_counter() - start) / passes


def _measured(
    row: ShapeRow, shape: Shape, windows: Sequence[int], dtype: torch.dtype, device: torch.device, repeats: int,
    passes: int | None, peak: float,
) -> ShapeRow:  # fmt: skip
    cuda = device.type == "cuda"
    passes, warm = passes or (24 if cuda else 8), 4 if cuda else 2
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    model = random_model(shape, dtype, device)
    target, noise = Target(top_k=shape.top_k), Noise(0, torch.arange(row.batch, device=device))

    def session(window: int) -> LlamaGenSession:
        condition, mask = condition_of(shape, row.batch)
        return LlamaGenSession(
            model, condition, mask, length=shape.grid**2, window=window, grid=shape.grid,
            guidance=Guidance(shape.guidance),
        )  # fmt: skip

    def once(window: int) -> Steady:
        fresh = session(window)
        return steady(fresh, sampler_of(window), target, noise, passes=passes, warm=warm, graph=graph())

    def graph() -> Graph | None:
        return Graph() if cuda else None

    runs: dict[int, list[Steady]] = {w: [] for w in windows}
    eager, used = [], None
    for turn in range(repeats):
        for window in windows:
            runs[window].append(once(window))
        if cuda and turn == 0:
            used = torch.cuda.max_memory_allocated(device) / GIB
        eager.append(eager_ms(model, shape, row.batch, min(passes, 8)))
    ms = {w: statistics.median(r.ms_per_pass for r in rs) for w, rs in runs.items()}
    captures = {w: rs[0].capture_seconds for w, rs in runs.items()}
    profiles = {
        w: profile_passes(session(w), sampler_of(w), target, noise, passes=min(passes, 8), warm=warm, graph=graph())
        for w in sorted({windows[0], windows[-1]})
    }
    return _plain_row(
        shape, row.batch, windows[-1], dtype, device, ms_per_pass=ms,
        of_bandwidth={w: row.streamed_gb / (t / 1e3) / peak for w, t in ms.items()},
        seconds_per_image=ms[1] / 1e3 * row.tokens / row.batch, eager_ms=statistics.median(eager),
        eager_ratio=statistics.median(eager) / ms[1], peak_gib=used,
        capture_seconds={w: c for w, c in captures.items() if c is not None}, profiles=profiles,
    )  # fmt: skip


def shapes_text(report: ShapeReport) -> str:
    """The table of `visar bench --shapes`, below it where a pass goes."""
    windows = sorted({w for r in report.rows for w in r.ms_per_pass} | {1})
    header = ("SHAPE", "DTYPE", "BATCH", *(f"MS/PASS W={w}" for w in windows), "GB/PASS", "OF BANDWIDTH",
              "AR S/IMAGE", "EAGER LOOP MS", "EAGER/AR", "PEAK GIB", "CAPTURE S")  # fmt: skip
    lines, notes, profiles = [], [], []
    for r in report.rows:
        ms = [f"{r.ms_per_pass[w]:.2f}" if w in r.ms_per_pass else "-" for w in windows]
        captured = f"{max(r.capture_seconds.values()):.2f}" if r.capture_seconds else "-"
        of = f"{100 * r.of_bandwidth[1]:.0f}%" if r.of_bandwidth else "-"
        numbers = [_number(x) for x in (r.seconds_per_image, r.eager_ms, r.eager_ratio, r.peak_gib)]
        lines.append((r.name, r.dtype, r.batch, *ms, f"{r.streamed_gb:.2f}", of, *numbers, captured))
        notes += [r.note] if r.note else []
        profiles += [(r.name, r.dtype, r.batch, p) for p in r.profiles.values()]
    parts, mode = [table(header, lines), *notes], ", invariant mode" if report.invariant else ""
    if profiles:
        parts += ["", profile_text(profiles, ("SHAPE", "DTYPE", "BATCH"))]
    return "\n".join(
        [
            *parts,
            f"Random weights of the published shapes, guidance on{mode}: the time of a pass, without acceptance or "
            f"images. {report.device}, {report.threads} threads, medians of {report.repeats} in the middle of an "
            f"image; copy bandwidth measured in this run: {report.bandwidth:.1f} GB/s.",
        ]
    )


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}"
