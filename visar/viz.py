"""Plots of decodings: maps of accepted tokens, curves of committed tokens, and comparisons of samplers.

Each function makes a matplotlib figure without pyplot, which notebooks display; `to_svg` turns it into SVG. Colours are
safe for colour-blind readers, with hatches and line styles in addition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import Self

from visar.errors import VisarError
from visar.figures import GREY, new_figure, quiet, to_svg
from visar.generation.stats import DecodeStats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Curve", "commit_curve", "compare", "heat_map", "to_svg", "tokens_per_pass"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
LINES = ("-", "--", "-.", ":")
FEW = 16  # up to this number, each integer has its own colour


@dataclass(frozen=True)
class Curve:
    """One run: after `passes[i]` passes, `seconds[i]` after the start, `tokens[i]` of an image were committed.

    A run that is not over has shorter series; tokens may be a mean over several images. Raises `VisarError` where
    lengths differ.
    """

    label: str
    passes: Sequence[int]
    tokens: Sequence[float]
    seconds: Sequence[float] | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.passes), len(self.tokens), len(self.tokens if self.seconds is None else self.seconds)}
        if len(lengths) > 1:
            raise VisarError(f"The series of curve {self.label!r} must be of one length, not {sorted(lengths)}.")

    @classmethod
    def of(cls, label: str, commit_pass: Any, seconds: float | None = None) -> Self:
        """The curve of an image from its row of `commit_pass` [N], with equal time for each pass.

        `seconds` is the time of the image's own passes. Given tokens count from the start.
        """
        row = _array(commit_pass)
        if row.ndim != 1:
            raise VisarError(f"A curve is of one image: commit_pass must be [N], not {list(row.shape)}.")
        passes = int(row.max(initial=-1)) + 1
        tokens = np.cumsum(np.bincount(row + 1, minlength=passes + 1))
        times = None if seconds is None else np.linspace(0, seconds, passes + 1).tolist()
        return cls(label, list(range(passes + 1)), tokens.tolist(), times)


def heat_map(
    commit_pass: Any, row: int = 0, *, image: Any = None, over: bool = False, most: int | None = None,
    missing: str = "given",
) -> Figure:  # fmt: skip
    """A map of an image: for each cell, how many tokens its pass committed.

    `commit_pass` [B, N] or [N] is that of an `ImageOutput`, or the output itself, whose image is then shown next to the
    map. `image` (PIL or [H, W, 3]) is shown next to it, or with `over` below it in grey. Colours go up to `most`
    tokens, by default the largest number; give it to compare maps. Cells of -1 are hatched, and labelled `missing`.
    Raises `VisarError` for a missing image, if N is not a square, or if `most` is too small.
    """
    images = getattr(commit_pass, "images", None)
    passes = _row(getattr(commit_pass, "commit_pass", commit_pass), row)
    if image is None and images is not None:
        image = images[row]
    if image is not None and hasattr(image, "detach"):  # [3, H, W] in [0, 1], of output_type="pt"
        image = image.detach().cpu().float().permute(1, 2, 0).numpy()
    counts = tokens_per_pass(passes)
    least = max(1, int(counts.max()))
    if most is not None and most < least:
        raise VisarError(f"A pass committed {least} tokens: most must be {least} or more, not {most}.")
    side = 2.6  # inches
    pair = image is not None and not over
    figure = new_figure((side + 0.15) * (2 if pair else 1) + 0.75, side + 0.2, "Map of tokens accepted by each pass")
    width, height = figure.get_size_inches()

    def square(left: float) -> Axes:
        axes = figure.add_axes((left / width, 0.1 / height, side / width, side / height))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color(GREY)
        return axes

    left = 0.1
    if pair:
        square(left).imshow(np.asarray(image), aspect="auto")
        left += side + 0.15
    axes = square(left)
    edge = counts.shape[0]
    extent = (0.0, float(edge), float(edge), 0.0)
    if image is not None and over:
        grey = np.asarray(image)[..., :3].mean(-1)  # only the map has colours
        axes.imshow(grey, cmap="gray", extent=extent, aspect="auto")
    cmap, norm, ticks = _scale(least if most is None else most)
    shown = np.ma.masked_less(counts, 0)
    cells = axes.imshow(
        shown, cmap=cmap, norm=norm, extent=extent, alpha=0.6 if over else 1, interpolation="nearest", aspect="auto"
    )
    if (counts < 0).any():
        _hatch(axes, counts < 0, missing)
    bar = figure.add_axes(((left + side + 0.1) / width, 0.1 / height, 0.14 / width, side / height))
    scale = figure.colorbar(cells, cax=bar, ticks=ticks)
    scale.set_label("tokens accepted by the pass", color=GREY, fontsize=9)
    scale.ax.tick_params(which="both", color=GREY, labelcolor=GREY, labelsize=8, length=2)
    scale.ax.minorticks_off()
    scale.outline.set_edgecolor(GREY)  # type: ignore[operator]
    return figure


def tokens_per_pass(commit_pass: Any) -> np.ndarray:
    """For each cell [side, side] the number of tokens that its pass committed; -1 for cells that no pass committed.

    Raises `VisarError` unless N of `commit_pass` [N] is a square.
    """
    row = _row(commit_pass, 0)
    side = math.isqrt(row.size)
    if side == 0 or side * side != row.size:
        raise VisarError(f"A map is of a square image: commit_pass must hold side x side cells, not {row.size}.")
    counts = np.bincount(row + 1)[row + 1]
    return np.where(row < 0, -1, counts).reshape(side, side)


def commit_curve(curves: Sequence[Curve], length: int, *, stacked: bool = False) -> Figure:
    """Committed tokens of an image of `length` tokens against passes, and against seconds where any curve has times.

    The dotted line is plain AR, one token per pass. Panels are side by side, or `stacked` for a narrow page. Raises
    `VisarError` if a curve has more tokens than `length`.
    """
    for curve in curves:
        if max(curve.tokens, default=0) > length:
            raise VisarError(f"Curve {curve.label!r} has {max(curve.tokens)} tokens of an image of {length}.")
    timed = any(curve.seconds is not None for curve in curves)
    rows, columns = (1 + timed, 1) if stacked else (1, 1 + timed)
    width, height = 4.0 if columns == 1 else 7.2, 2.9 * rows
    figure = new_figure(width, height, "Committed tokens against passes and seconds")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    # Fixed margins, so that a plot that is updated during decoding does not jump.
    figure.subplots_adjust(
        0.55 / width, 0.5 / height, 1 - 0.12 / width, 1 - 0.1 / height, wspace=0.06, hspace=0.5 / 2.3
    )
    panels[0].plot([0, length], [0, length], ":", color=GREY, linewidth=1.2, label="one token per pass")
    for i, curve in enumerate(curves):
        style: dict[str, Any] = {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": LINES[i % len(LINES)],
            "linewidth": 1.8,
            "label": curve.label.replace("$", r"\$").lstrip("_"),  # special characters of matplotlib
        }
        panels[0].plot(curve.passes, curve.tokens, **style)
        if curve.seconds is not None:
            panels[1].plot(curve.seconds, curve.tokens, **style)
    for axes, unit in zip(panels, ("passes", "seconds"), strict=False):
        quiet(axes)
        axes.set_xlabel(unit)
        axes.set_xlim(left=0)
        axes.set_ylim(0, length * 1.03)
    for axes in panels[: None if stacked else 1]:
        axes.set_ylabel("committed tokens")
    # Curves are above the diagonal: this corner is free.
    panels[0].legend(loc="lower right", fontsize=8, labelcolor=GREY, frameon=False)
    return figure


def compare(runs: Sequence[DecodeStats] | Mapping[str, Any]) -> Figure:
    """Samplers side by side: passes (NFE) and ms per pass in separate panels; bars of relaxed ones are hatched.

    `runs` are the `stats` of several calls, or a report of `visar bench --json`, read by `json.load`. Raises
    `VisarError` if there are no samplers.
    """
    if isinstance(runs, Mapping):
        if not isinstance(runs.get("rows"), Sequence) or not all("nfe" in row for row in runs["rows"]):
            raise VisarError("This is no report of samplers: give what `visar bench --samplers ... --json FILE` wrote.")
        rows = [(str(r["sampler"]), bool(r["exact"]), float(r["nfe"]), float(r["ms_per_pass"])) for r in runs["rows"]]
        where = [f"batch {runs['batch']}", str(runs["device"]), str(runs["dtype"])]
    else:
        rows = [(s.sampler, s.exact, s.nfe, s.ms_per_pass) for s in runs]
        settings = [(s.images, s.settings.get("device"), s.settings.get("dtype")) for s in runs]
        where = [f"batch {images}, {device}, {dtype}" for images, device, dtype in dict.fromkeys(settings)]
    if not rows:
        raise VisarError("There are no samplers to compare.")
    figure = new_figure(7.2, 1.25 + 0.3 * len(rows), "Passes and milliseconds per pass of samplers")
    figure.set_layout_engine("constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, column, unit, form in ((panels[0], 2, "passes (NFE)", ".1f"), (panels[1], 3, "ms per pass", ".2f")):
        values = [float(row[column]) for row in rows]
        bars = axes.barh(range(len(rows)), values, height=0.62, color=[COLOURS[0 if row[1] else 1] for row in rows])
        for bar, row in zip(bars, rows, strict=True):
            if not row[1]:
                bar.set_hatch("////")
                bar.set_edgecolor("white")
        axes.bar_label(bars, [format(v, form).removesuffix(".0") for v in values], padding=3, fontsize=8, color=GREY)
        quiet(axes)
        axes.grid(False)
        axes.set_xlabel(unit)
        axes.set_xlim(0, max(values) * 1.18)  # room for the numbers
    panels[0].set_yticks(range(len(rows)), [row[0] for row in rows])
    panels[0].invert_yaxis()
    _exactness_legend(figure, {row[1] for row in rows})
    figure.suptitle(f"one run, this machine ({'; '.join(where)})", fontsize=9, color=GREY)
    return figure


def _array(values: Any) -> np.ndarray:
    """Whole numbers of a tensor on any device, or of anything that numpy reads."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=np.int64)


def _row(commit_pass: Any, image: int) -> np.ndarray:
    """The passes of one image, [N]."""
    passes = np.atleast_2d(_array(commit_pass))
    if passes.ndim > 2:
        raise VisarError(f"commit_pass must be [B, N] or [N], not {list(passes.shape)}.")
    if not 0 <= image < len(passes):
        raise VisarError(f"There is no image {image}: there are {len(passes)}, counted from 0.")
    return passes[image]


def _scale(most: int) -> tuple[Any, Any, Any]:
    """The colour map, its norm, and ticks for counts of 1 to `most`; up to `FEW` have one colour each."""
    from matplotlib import colormaps, colors, ticker

    if most > FEW:
        return colormaps["viridis"], colors.Normalize(1, most), ticker.MaxNLocator(8, integer=True, min_n_ticks=2)
    cmap = colormaps["viridis"].resampled(max(2, most))
    return cmap, colors.BoundaryNorm(np.arange(most + 1) + 0.5, cmap.N), np.arange(1, most + 1)


def _hatch(axes: Axes, cells: np.ndarray, name: str) -> None:
    """Hatch the cells [side, side] that are true, with `name` in the legend."""
    from matplotlib.patches import Patch, PathPatch
    from matplotlib.path import Path

    squares = [Path([(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1), (x, y)]) for y, x in np.argwhere(cells)]
    style: dict[str, Any] = {"facecolor": "none", "edgecolor": GREY, "hatch": "////", "linewidth": 0}
    axes.add_patch(PathPatch(Path.make_compound_path(*squares), **style))
    axes.legend(handles=[Patch(label=name, **style)], loc="lower right", fontsize=8)


def _exactness_legend(figure: Figure, found: set[bool]) -> None:
    """The legend of the bars' colours."""
    from matplotlib.patches import Patch

    exact = Patch(color=COLOURS[0], label="exact: the model's own distribution")
    relaxed = Patch(facecolor=COLOURS[1], hatch="////", edgecolor="white", label="relaxed: another distribution")
    handles = [patch for patch, kind in ((exact, True), (relaxed, False)) if kind in found]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False, labelcolor=GREY)
