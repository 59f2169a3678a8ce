"""The page of a report: one HTML file that needs no other, and the same in Markdown with its images next to it."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw

from visar.bulk import RunFolder
from visar.eval.report.make import OTHER_SEED, PAGE, Entry, Report
from visar.eval.report.plots import Point, draw
from visar.files import replacing, writable_folder
from visar.image_files import converted, open_image

ROWS = 8  # prompts in the grid
SIDE = 96  # pixels of an image on the page, at least
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, td.text { text-align: left; }
td.text { white-space: normal; min-width: 16rem; }
img { image-rendering: pixelated; max-width: 100%; }
figure { display: inline-block; margin: .4rem .8rem .8rem 0; vertical-align: top; }
figcaption { font-size: 13px; color: #555; max-width: 14rem; }
.changed { color: #a40000; } .same { color: #2d6a2d; }
"""
HEADER = (
    "sampler", "distribution", "NFE", "tokens per pass", "ms per pass", "s per image", "NFE ratio", "time ratio",
    "same images", "same tokens", "energy distance", "seen from", "p", "from the reference", "change of score",
    "result",
)  # fmt: skip


def write_page(report: Report, out: str | Path) -> list[Path]:
    """Write report.html, report.md, report.json, plot.svg and grid.webp into the folder `out`; give their paths."""
    folder = writable_folder(out)
    files = [folder / name for name in PAGE]
    page, text, data, plot, grid = files
    first = report.entries[0].label
    draw(_points(report), plot, x=f"NFE, as a share of {first}'s", y=f"energy distance from {first}'s images", floor=0)
    with replacing(grid) as temporary:
        _grid(report).save(temporary, quality=85)
    with replacing(data) as temporary:
        temporary.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    with replacing(text) as temporary:
        temporary.write_text(_markdown(report), encoding="utf-8")
    with replacing(page) as temporary:
        temporary.write_text(_html(report, plot.read_text(encoding="utf-8"), grid.read_bytes()), encoding="utf-8")
    return files


def _title(entry: Entry, report: Report) -> str:
    return entry.label + (OTHER_SEED if entry is report.entries[0] else "")


def _points(report: Report) -> list[Point]:
    speed = {row.sampler: row for row in report.speed.rows}
    return [
        Point(e.label, _title(e, report), speed[e.label].nfe_ratio, e.comparison.overall.distance, exact=e.exact)
        for e in report.entries
    ]


def _cells(report: Report) -> list[tuple[str, ...]]:
    speed = {row.sampler: row for row in report.speed.rows}
    out: list[tuple[str, ...]] = []
    for e in report.entries:
        s, c = speed[e.label], e.comparison
        out.append((
            _title(e, report), "exact" if e.exact else "relaxed", f"{s.nfe:.1f}", f"{s.tokens_per_pass:.2f}",
            f"{s.ms_per_pass:.2f}", f"{s.seconds_per_image:.2f}", f"{s.nfe_ratio:.2f}", f"{s.time_ratio:.2f}",
            f"{100 * c.same:.0f}%", "" if c.tokens is None else f"{100 * c.tokens:.0f}%",
            f"{c.overall.distance:.3g}", f"{max(c.overall.least, 0):.2g}", f"{c.p:.2g}",
            "" if c.reference is None else f"{c.reference.b:.3g} ({_signed(c.reference.low, c.reference.high)})",
            "" if c.clip is None else f"{c.clip.difference:+.3f} ({_signed(c.clip.low, c.clip.high)})",
            f"changed: {c.what}" if c.changed else "no change seen",
        ))  # fmt: skip
    return out


def _signed(low: float, high: float) -> str:
    return f"{low:+.3g} to {high:+.3g}"


def _shown(report: Report) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table without empty columns."""
    rows = _cells(report)
    shown = [i for i in range(len(HEADER)) if any(row[i] for row in rows)]
    return tuple(HEADER[i] for i in shown), [tuple(row[i] for i in shown) for row in rows]


def _facts(report: Report) -> list[str]:
    c, s = report.entries[0].comparison, report.speed
    first = report.entries[0].label
    settings = ", ".join(f"{name} {value}" for name, value in report.settings.items() if value is not None)
    return [
        f"{c.images} images of {c.prompts} prompts by {report.model}, seed {report.seed}"
        + (f", {settings}." if settings else "."),
        f"Compared with {first} under the same seed, image by image; {first} itself with its own seed "
        f"{report.seed + 1}, which shows chance.",
        f"Energy distances of {c.features} features (weights {c.weights[:12]}): 0 on average where distributions are "
        "equal, so below 0 as often as above. p: of permutations within pairs, and of scores, times the number of "
        "tests.",
        f"Speed: {s.device}, {s.dtype}, {s.threads} threads, batch {s.batch}, {s.images} images, in one run; ratios "
        f"are against {first}. Intervals are of 95%.",
    ]


def _thumbnail(file: Path) -> Image.Image:
    with open_image(file, file) as found:
        image = converted(found, "RGB", file)
    times = max(1, -(-SIDE // max(image.size)))
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def _prompts(report: Report) -> list[tuple[str, str]]:
    """The first images' files and prompts, of different prompts."""
    out: dict[str, str] = {}
    run = RunFolder(report.entries[0].folder)
    for line in run.finished():
        out.setdefault(str(line.get("prompt", f"class {line.get('class')}")), run.file(line).name)
    return [(file, prompt) for prompt, file in list(out.items())[:ROWS]]


def _columns(report: Report) -> list[tuple[str, Path]]:
    """Samplers' titles and folders at equal seeds; the first one's other seed comes last."""
    first = report.entries[0]
    others = [(e.label, e.folder) for e in report.entries[1:]]
    return [(first.label, Path(first.comparison.a)), *others, (_title(first, report), first.folder)]


def _grid(report: Report) -> Image.Image:
    """A column for each sampler, a row for each prompt."""
    columns, prompts = _columns(report), _prompts(report)
    images = [[_thumbnail(folder / file) for _, folder in columns] for file, _ in prompts]
    side, margin, head = images[0][0].width, 150, 16
    canvas = Image.new("RGB", (margin + side * len(columns), head + images[0][0].height * len(prompts)), "white")
    pen = ImageDraw.Draw(canvas)
    for x, (title, _) in enumerate(columns):
        pen.text((margin + x * side + 2, 2), title[: side // 6], fill="black")
    for y, (row, (_, prompt)) in enumerate(zip(images, prompts, strict=True)):
        pen.text((2, head + y * row[0].height + 4), prompt[:24], fill="black")
        for x, image in enumerate(row):
            canvas.paste(image, (margin + x * side, head + y * image.height))
    return canvas


def _markdown(report: Report) -> str:
    header, rows = _shown(report)
    lines = [
        f"# Samplers of {escaped(report.model)}", "", *map(escaped, _facts(report)), "",
        f"| {' | '.join(header)} |", f"|{'---|' * len(header)}",
        *(f"| {' | '.join(map(escaped, row))} |" for row in rows), "",
        "![passes against energy distance](plot.svg)", "", "## The same prompts and seeds", "",
        "![a column for each sampler](grid.webp)", "", "## What changed most", "",
        f"Per sampler, the images that lost most by {report.ranked_by}:", "",
        *(f"- {escaped(_title(e, report))}: " + "; ".join(f"{escaped(w.prompt)} ({w.drop:.3g})" for w in e.worst)
          for e in report.entries), "",
    ]  # fmt: skip
    return "\n".join(lines)


def escaped(text: str) -> str:
    """The text as Markdown shows it, on one line: no markup, no HTML, no link."""
    return re.sub(r"[\\`*_\[\]<>&|~]|:(?=//)|(?<=www)\.", r"\\\g<0>", " ".join(text.split()))


def _html(report: Report, plot: str, grid: bytes) -> str:
    header, rows = _shown(report)
    changed = [e.comparison.changed for e in report.entries]
    body = [
        f"<h1>Samplers of {html.escape(report.model)}</h1>",
        *(f"<p>{html.escape(fact)}</p>" for fact in _facts(report)),
        "<table><tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in header) + "</tr>",
        *(_row(row, c) for row, c in zip(rows, changed, strict=True)),
        "</table>",
        plot[plot.index("<svg") :],
        "<h2>The same prompts and seeds</h2>",
        _img(grid, "webp", "a column for each sampler, a row for each prompt"),
        "<h2>What changed most</h2>",
        f"<p>By {html.escape(report.ranked_by)}: {html.escape(report.entries[0].label)} on the left.</p>",
        *(_worst(e, report) for e in report.entries),
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Samplers of {html.escape(report.model)}</title><style>{STYLE}</style>\n"
        + "\n".join(body)
        + "</html>\n"
    )


def _row(cells: Sequence[str], changed: bool) -> str:
    *values, conclusion = (html.escape(cell) for cell in cells)
    mark = "changed" if changed else "same"
    return "<tr>" + "".join(f"<td>{c}</td>" for c in values) + f'<td class="text {mark}">{conclusion}</td></tr>'


def _worst(entry: Entry, report: Report) -> str:
    figures = []
    for w in entry.worst:
        pair = [_thumbnail(folder / f"{w.id}.png") for folder in (Path(entry.comparison.a), entry.folder)]
        both = Image.new("RGB", (2 * pair[0].width + 4, pair[0].height), "white")
        for x, image in enumerate(pair):
            both.paste(image, (x * (image.width + 4), 0))
        buffer = BytesIO()
        both.save(buffer, "webp", lossless=True)
        caption = html.escape(f"{w.prompt} ({w.drop:.3g})")
        figures.append(
            f"<figure>{_img(buffer.getvalue(), 'webp', w.prompt)}<figcaption>{caption}</figcaption></figure>"
        )
    return f"<h3>{html.escape(_title(entry, report))}</h3>{''.join(figures)}"


def _img(data: bytes, kind: str, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
