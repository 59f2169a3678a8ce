"""The time of a pass of a published shape: `visar bench --shapes`. Weights are random, and every result says so.

A pass is timed in the middle of an image, where the cache has its mean length, so that its time by the number of
passes is that of an image. It is compared with the bytes that it must read (weights without embedding tables,
keys and values of what is committed) and against the loop that users of the model run today, at the same shape:
LlamaGen's published eager loop, or the `generate` of transformers.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from visar.engine.graphs import Graph
from visar.engine.memory import GIB, free_memory
from visar.engine.rng import Noise
from visar.errors import VisarError, unknown
from visar.eval.benchmark.decoder_shapes import DECODERS
from visar.eval.benchmark.llamagen_shapes import published
from visar.eval.benchmark.profiling import PassProfile, profile_passes, profile_text
from visar.eval.benchmark.shape import Shape
from visar.eval.benchmark.speed import bandwidth, device_title
from visar.eval.benchmark.steady import Steady, steady
from visar.kernels.invariant import is_invariant
from visar.samplers import Autoregressive, Sampler, SpeculativeJacobi, Target
from visar.tables import table

MOST_WINDOW = 128
WINDOWS = (1, 16, 32, 64)


SHAPES: dict[str, Shape] = {**published(), **DECODERS}
DEFAULTS = {
    "cuda": (
        "L-384", "XL-384", "XL-512", "3B-384", "Janus-Pro-1B", "Janus-Pro-7B", "GLM-Image-1024", "Emu3-720",
        "Lumina-7B-768", "Emu3.5-1024",
    ),
    "cpu": ("B-256", "L-256", "Janus-0.15B"),
}  # fmt: skip
BATCHES = {"cuda": (1, 8), "cpu": (1,)}
DTYPES = {"cuda": (torch.bfloat16,), "cpu": (torch.bfloat16, torch.float32)}


@dataclass(frozen=True)
class ShapeRow:
    """One shape with random weights at one batch and dtype; times are medians, by window.

    `streamed_gb`: the bytes that a pass must read, in 10**9; `of_bandwidth`: that over the time and over the bandwidth
    of a copy; `seconds_per_image`: of plain decoding, a pass by the number of `passes` over the batch; `stock_ms`: a
    token of each image by the loop that users of the model run today, `stock_tokens_per_second` of all images, and
    `stock_ratio` to a pass of one token. `peak_gib` and `capture_seconds` are a GPU's, the latter where a graph was
    captured. A row with a `note` was not measured, or lacks the stock loop.
    """

    name: str
    batch: int
    dtype: str
    tokens: int
    passes: int
    needed_gib: float
    streamed_gb: float
    ms_per_pass: dict[int, float] = field(default_factory=dict)
    of_bandwidth: dict[int, float] = field(default_factory=dict)
    seconds_per_image: float | None = None
    stock_ms: float | None = None
    stock_tokens_per_second: float | None = None
    stock_ratio: float | None = None
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
        gc.collect()  # modules of transformers hold themselves, and the next shape needs their memory
        lacks = _problem(shape, batch, windows[-1], dtype, device, free_memory(device))
        row = _plain_row(shape, batch, windows[-1], dtype, device, note=lacks)
        rows.append(row if lacks else _measured(row, shape, windows, dtype, device, repeats, passes, peak))
    return ShapeReport(
        device_title(device), torch.__version__, torch.get_num_threads(), repeats, peak, rows, invariant=is_invariant()
    )


def _problem(shape: Shape, batch: int, window: int, dtype: torch.dtype, device: torch.device, free: int) -> str:
    """Why a shape does not fit into `free` bytes and what would, or nothing."""
    if why := shape.refused(device):
        return f"{shape.name}: {why}"
    needed = shape.needed(batch, window, dtype, device)
    if needed <= free:
        return ""
    fits = [b for b in range(1, batch) if shape.needed(b, window, dtype, device) <= free]
    smaller = [s.name for s in SHAPES.values() if not s.refused(device) and s.needed(1, window, dtype, device) <= free]
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
    kind = str(dtype).removeprefix("torch.")
    return ShapeRow(shape.name, batch, kind, shape.tokens, shape.passes, needed, streamed, **more)


def sampler_of(window: int) -> Sampler:
    """Plain decoding, or coupled speculative Jacobi decoding in a window."""
    return Autoregressive() if window == 1 else SpeculativeJacobi(window=window, coupling="maximal")


def _measured(
    row: ShapeRow, shape: Shape, windows: Sequence[int], dtype: torch.dtype, device: torch.device, repeats: int,
    passes: int | None, peak: float,
) -> ShapeRow:  # fmt: skip
    cuda = device.type == "cuda"
    stock_tokens = min(passes or shape.stock_tokens, shape.stock_tokens)
    passes, warm = passes or (24 if cuda else 8), 4 if cuda else 2
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    model = shape.make(dtype, device)
    target = Target(top_k=shape.top_k, top_p=shape.top_p)
    noise = Noise(0, torch.arange(row.batch, device=device))

    def once(window: int) -> Steady:
        fresh = shape.session(model, row.batch, window)
        return steady(fresh, sampler_of(window), target, noise, passes=passes, warm=warm, graph=graph())

    def graph() -> Graph | None:
        return Graph() if cuda else None

    runs: dict[int, list[Steady]] = {w: [] for w in windows}
    stock, used, note = [], None, ""
    for turn in range(repeats):
        for window in windows:
            runs[window].append(once(window))
        if cuda and turn == 0:
            used = torch.cuda.max_memory_allocated(device) / GIB
        if not note:
            try:
                stock.append(shape.stock_ms(model, row.batch, stock_tokens))
            except VisarError as error:
                note = str(error)
    ms = {w: statistics.median(r.ms_per_pass for r in rs) for w, rs in runs.items()}
    captures = {w: rs[0].capture_seconds for w, rs in runs.items()}
    profiles = {
        w: profile_passes(
            shape.session(model, row.batch, w), sampler_of(w), target, noise, passes=min(passes, 8), warm=warm,
            graph=graph(),
        )
        for w in sorted({windows[0], windows[-1]})
    }  # fmt: skip
    taken = statistics.median(stock) if stock and not note else None
    return _plain_row(
        shape, row.batch, windows[-1], dtype, device, ms_per_pass=ms,
        of_bandwidth={w: row.streamed_gb / (t / 1e3) / peak for w, t in ms.items()},
        seconds_per_image=ms[1] / 1e3 * row.passes / row.batch, stock_ms=taken,
        stock_tokens_per_second=1e3 * row.batch / taken if taken else None,
        stock_ratio=taken / ms[1] if taken else None, peak_gib=used, note=note,
        capture_seconds={w: c for w, c in captures.items() if c is not None}, profiles=profiles,
    )  # fmt: skip


def shapes_text(report: ShapeReport) -> str:
    """The table of `visar bench --shapes`, below it where a pass goes."""
    windows = sorted({w for r in report.rows for w in r.ms_per_pass} | {1})
    header = ("SHAPE", "DTYPE", "BATCH", *(f"MS/PASS W={w}" for w in windows), "GB/PASS", "OF BANDWIDTH",
              "AR S/IMAGE", "STOCK MS/TOKEN", "STOCK/AR", "PEAK GIB", "CAPTURE S")  # fmt: skip
    lines, notes, profiles = [], [], []
    for r in report.rows:
        ms = [f"{r.ms_per_pass[w]:.2f}" if w in r.ms_per_pass else "-" for w in windows]
        captured = f"{max(r.capture_seconds.values()):.2f}" if r.capture_seconds else "-"
        of = f"{100 * r.of_bandwidth[1]:.0f}%" if r.of_bandwidth else "-"
        numbers = [_number(x) for x in (r.seconds_per_image, r.stock_ms, r.stock_ratio, r.peak_gib)]
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
