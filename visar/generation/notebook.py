"""The HTML of an output in a notebook: images and a table of stats."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image

from visar.generation.stats import DecodeStats

MOST = 16  # images
SIDE = 160  # pixels; larger images are scaled down


def output_html(images: Sequence[Image.Image], stats: DecodeStats) -> str:
    """The first `MOST` images as inline PNG, the number of the others, and the table of `stats`."""
    shown = "".join(f'<img src="{_data_uri(image)}" alt="" style="width:{SIDE}px">' for image in images[:MOST])
    rest = len(images) - MOST
    more = f"<div>and {rest} more</div>" if rest > 0 else ""
    return f'<div style="display:flex;flex-wrap:wrap;gap:8px">{shown}</div>{more}{stats._repr_html_()}'


def _data_uri(image: Image.Image) -> str:
    """A PNG of at most `SIDE` pixels along its longer side."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
