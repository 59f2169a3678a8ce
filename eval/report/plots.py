"""A plot of samplers by their speed and by how far they move the distribution or the images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from visar.errors import VisarError
from visar.figures import new_figure, require_matplotlib, saving
from visar.files import replacing, writable_folder


class Point(NamedTuple):
    """A sampler of a family (joined by a line), the label of its point, and where that is."""

    family: str
    label: str
    x: float
    y: float
    error: float = 0.0
    exact: bool = False


def draw(points: Sequence[Point], file: str | Path, *, x: str, y: str, floor: float | None = None) -> None:
    """Write the points into a .svg, .png or .pdf file: round ones are exact, square ones are not.

    `floor` is where an exact sampler lies.
    """
    check(file)
    from matplotlib import colormaps

    figure = new_figure(8, 5, f"{y} against {x}")
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    families = list(dict.fromkeys(p.family for p in points))
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    for i, family in enumerate(families):
        own = [p for p in points if p.family == family]
        axes.errorbar(
            [p.x for p in own], [p.y for p in own], [p.error for p in own] if any(p.error for p in own) else None,
            marker="o" if own[0].exact else "s", label=family, color=colours[i % 20], linewidth=1, markersize=5,
        )  # fmt: skip
        for p in own:
            axes.annotate(p.label, (p.x, p.y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    if floor is not None:
        axes.axhline(floor, color="grey", linewidth=0.8, linestyle=":", label="an exact sampler")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    if len(points) > len(families):
        axes.legend(fontsize=7)
    with replacing(file) as temporary, saving():
        figure.savefig(temporary, format=Path(file).suffix.lstrip("."), metadata=_nameless(file))


def check(file: str | Path) -> None:
    """Raise `VisarError` where no plot can be written to `file`; for asking before hours of measuring."""
    require_matplotlib()
    suffix = Path(file).suffix
    if suffix not in (".svg", ".png", ".pdf"):
        raise VisarError(f"A plot is a .svg, .png or .pdf file, not a {suffix or 'nameless'} file.")
    writable_folder(Path(file).parent)


def _nameless(file: str | Path) -> dict[str, None] | None:
    return {"Date": None} if Path(file).suffix == ".svg" else None
