"""Matplotlib figures without pyplot, so that threads can plot in parallel and no window is needed."""

from __future__ import annotations

import hashlib
import html
import io
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from visar.errors import VisarError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#767676"  # legible on white and on black
_saving = threading.Lock()


def require_matplotlib() -> None:
    """Raise `VisarError` if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise VisarError(
            "Plots need matplotlib, of the extras `demo` and `eval`: pip install 'visar[demo]' or 'visar[eval]'."
        ) from error


def new_figure(width: float, height: float, label: str) -> Figure:
    """An empty figure, `width` x `height` in inches, which notebooks display; `label` is for screen readers.

    Raises `VisarError` if matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=144, label=label)
    vars(figure)["_repr_html_"] = partial(to_svg, figure)  # matplotlib's own method needs pyplot
    return figure


def quiet(axes: Axes) -> None:
    """Grey text and lines without a frame."""
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(color=GREY, labelcolor=GREY, labelsize=8)
    axes.xaxis.label.set_color(GREY)
    axes.yaxis.label.set_color(GREY)
    axes.grid(color=GREY, alpha=0.2, linewidth=0.6)


@contextmanager
def saving() -> Iterator[None]:
    """In this block equal figures give equal files, and text of an SVG stays text.

    One thread at a time, because matplotlib's settings are global.
    """
    import matplotlib

    with _saving, matplotlib.rc_context({"svg.hashsalt": "visar", "svg.fonttype": "none"}):
        yield


def to_svg(figure: Figure) -> str:
    """An inline `<svg>` that fills the available width: transparent, with selectable text, and without external files.

    Equal figures give equal SVGs; ids of different figures on a page differ.
    """
    buffer = io.StringIO()
    nameless = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with saving():
        figure.savefig(buffer, format="svg", transparent=True, metadata=nameless)
    body = buffer.getvalue().partition("<svg")[2]
    head, _, body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.S).partition(">")
    mark = f"v{hashlib.sha256(body.encode()).hexdigest()[:10]}-"
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{mark}", body)
    head = re.sub(r'\s(width|height)="[\d.]+pt"', "", head)
    width = figure.get_figwidth() * 96  # CSS pixels of an inch
    label = html.escape(str(figure.get_label()))
    return f'<svg role="img" aria-label="{label}" style="width:100%;max-width:{width:.0f}px;height:auto"{head}>{body}'
