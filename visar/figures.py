"""Figures that belong to nobody: matplotlib without pyplot, so that threads draw at once and no window is asked for."""

from __future__ import annotations

import hashlib
import html
import io
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Literal

from visar.errors import VisarError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#767676"  # text that is legible on white and on black
_saving = threading.Lock()


def require_matplotlib() -> None:
    """Raise `VisarError` where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise VisarError(
            "Plots need matplotlib, of the extras `demo` and `eval`: pip install 'visar[demo]' or 'visar[eval]'."
        ) from error


def new_figure(width: float, height: float, label: str) -> Figure:
    """An empty figure of so many inches that shows itself in a notebook; `label` says to a screen reader what it is.

    Raises `VisarError` where matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=144, label=label)
    vars(figure)["_repr_html_"] = partial(to_svg, figure)  # matplotlib's own shows nothing without pyplot
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
def saving(fonttype: Literal["path", "none"] = "path") -> Iterator[None]:
    """Within it the same figure gives the same file, and text of an SVG is drawn as paths or stays text ("none").

    One at a time: matplotlib's settings are those of the whole process.
    """
    import matplotlib

    with _saving, matplotlib.rc_context({"svg.hashsalt": "visar", "svg.fonttype": fonttype}):
        yield


def to_svg(figure: Figure) -> str:
    """An inline `<svg>` as wide as there is room for: transparent, its text is text, and it loads nothing.

    The same figure gives the same text; ids of different figures on a page differ.
    """
    buffer = io.StringIO()
    nameless = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with saving("none"):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nameless)
    body = buffer.getvalue().partition("<svg")[2]
    head, _, body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.S).partition(">")
    mark = f"v{hashlib.sha256(body.encode()).hexdigest()[:10]}-"
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{mark}", body)
    head = re.sub(r'\s(width|height)="[\d.]+pt"', "", head)
    width = figure.get_figwidth() * 96  # CSS pixels of an inch
    label = html.escape(str(figure.get_label()))
    return f'<svg role="img" aria-label="{label}" style="width:100%;max-width:{width:.0f}px;height:auto"{head}>{body}'
