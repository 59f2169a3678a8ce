"""Images while they are decoded, in a terminal: by the graphics of kitty, iTerm2 or sixel, else in half blocks."""

from __future__ import annotations

import base64
import io
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from PIL import Image

if TYPE_CHECKING:
    from visar.generation.progress import Progress

LINES = 8  # of a terminal, for an image
SIDE = 160  # pixels of an image where the terminal has pixels
EVERY = 0.15  # seconds
MOST = 4  # images


def protocol(stream: TextIO, environment: Mapping[str, str] = os.environ) -> str:
    """How a stream shows images: "kitty", "iterm", "sixel", "blocks" or "none". Only a terminal shows any."""
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if not stream.isatty() or term in ("", "dumb"):
        return "none"
    if environment.get("TMUX") or term.startswith(("screen", "tmux")):
        return "blocks"  # which hand no graphics on
    if "kitty" in term or environment.get("KITTY_WINDOW_ID") or program in ("ghostty", "WezTerm"):
        return "kitty"
    if program in ("iTerm.app", "mintty") or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm"
    if "sixel" in term or term.startswith(("foot", "mlterm", "contour")):
        return "sixel"
    return "blocks"


class Preview:
    """A step callback that shows the first images in one place of `stream`; `close` leaves the cursor below."""

    def __init__(self, stream: TextIO, form: str):
        self.stream, self.form = stream, form
        self._shown, self._lines = 0.0, 0

    def __call__(self, progress: Progress) -> None:
        if time.monotonic() - self._shown < EVERY:
            return
        pixels = progress.preview()[:MOST].cpu().numpy()
        strip = grid([Image.fromarray(image) for image in pixels], columns=len(pixels), gap=1)
        said = f"{int(progress.lengths.sum()):,} of {progress.tokens.shape[0] * progress.tokens.shape[1]:,} tokens, "
        self.show(strip, f"{said}{progress.passes} passes")
        self._shown = time.monotonic()

    def show(self, image: Image.Image, said: str) -> None:
        """Show an image and a line of text below it, where the last ones were."""
        back = f"\x1b[{self._lines}A" if self._lines else ""
        if self.form == "blocks":
            rows, height = blocks(image), (image.height + 1) // 2
            self.stream.write(f"{back}{rows}\x1b[2K{said}\n")
            self._lines = height + 1
        else:
            # Room for the image first, so that nothing scrolls while it is drawn.
            room = "" if self._lines else "\n" * (LINES + 1) + f"\x1b[{LINES + 1}A"
            scale = max(1, SIDE // image.height)
            large = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
            drawn = {"kitty": kitty, "iterm": iterm, "sixel": sixel}[self.form](large)
            self.stream.write(f"{back}{room}\x1b7{drawn}\x1b8\x1b[{LINES}B\r\x1b[2K{said}\n")
            self._lines = LINES + 1
        self.stream.flush()


def blocks(image: Image.Image) -> str:
    """Two pixels in each character, in 24-bit colours."""
    lines = []
    for y in range(0, image.height, 2):
        line = ""
        for x in range(image.width):
            (r, g, b), below = image.getpixel((x, y)), min(y + 1, image.height - 1)  # type: ignore[misc]
            (r2, g2, b2) = image.getpixel((x, below))  # type: ignore[misc]
            line += f"\x1b[38;2;{r};{g};{b}m\x1b[48;2;{r2};{g2};{b2}m▀"
        lines.append(f"{line}\x1b[0m\x1b[K\n")
    return "".join(lines)


def kitty(image: Image.Image) -> str:
    """The graphics protocol of kitty: PNG in parts of 4,096 characters, always the same image number."""
    data = _png(image)
    parts = [data[i : i + 4096] for i in range(0, len(data), 4096)]
    head = f"a=T,f=100,i=1,p=1,q=2,C=1,r={LINES},"
    return "".join(
        f"\x1b_G{head if n == 0 else ''}m={int(n < len(parts) - 1)};{part}\x1b\\" for n, part in enumerate(parts)
    )


def iterm(image: Image.Image) -> str:
    """The inline images of iTerm2."""
    return f"\x1b]1337;File=inline=1;height={LINES};preserveAspectRatio=1:{_png(image)}\x07"


def sixel(image: Image.Image) -> str:
    """DEC sixels with 64 colours: bands of six rows, a line for each colour in a band."""
    small = image.quantize(64)
    palette = small.getpalette() or []
    colours = sorted({index for _, index in small.getcolors(64) or []})  # type: ignore[misc]
    found = "".join(
        f"#{c};2;{';'.join(str(round(v * 100 / 255)) for v in palette[3 * c : 3 * c + 3])}"  # type: ignore[operator, index]
        for c in colours
    )
    pixels = small.load()
    assert pixels is not None
    for top in range(0, small.height, 6):
        rows = range(top, min(top + 6, small.height))
        for c in colours:
            masks = [sum(1 << (y - top) for y in rows if pixels[x, y] == c) for x in range(small.width)]
            if any(masks):
                found += f"#{c}{''.join(chr(63 + mask) for mask in masks)}$"
        found += "-"
    return f'\x1bPq"1;1;{small.width};{small.height}{found}\x1b\\'


def squarish(count: int) -> int:
    """The columns of a grid that is about as high as it is wide."""
    return math.ceil(math.sqrt(count))


def grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 0) -> Image.Image:
    """Images of one size in rows of `columns`, by default about as many as there are rows."""
    columns = columns or squarish(len(images))
    width, height = (side + gap for side in images[0].size)
    made = Image.new("RGB", (columns * width - gap, -(-len(images) // columns) * height - gap))
    for number, image in enumerate(images):
        made.paste(image, (number % columns * width, number // columns * height))
    return made


class Plain:
    """A stream for a progress bar where there is no terminal: each state is a line of its own."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            self.stream.write(f"visar: {line}\n")

    def flush(self) -> None:
        self.stream.flush()


def bar(stream: TextIO) -> dict[str, object]:
    """Options of a progress bar: one that moves on a terminal, and elsewhere a line every few seconds."""
    if stream.isatty():
        return {"disable": False}
    form = "{n_fmt} of {total_fmt} tokens, {elapsed} so far, about {remaining} left"
    return {"file": Plain(stream), "bar_format": form, "mininterval": 5, "maxinterval": 5, "delay": 5, "leave": False}


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
