"""Runs as HTML that loads nothing: images, progress, results, maps, curves and sentences."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from functools import cache
from importlib import resources

from PIL import Image

from visar.demo import words
from visar.demo.links import link_of
from visar.demo.models import DemoModel
from visar.demo.requests import Request
from visar.demo.runs import Frame, Run
from visar.generation.pool import Finished, Glance
from visar.samplers import spec_of
from visar.viz import Curve, commit_curve, heat_map, to_svg

IN_WORDS = {
    "exact": "Exact: the images have the distribution of plain decoding.",
    "relaxed": "Relaxed: the images have another distribution than those of plain decoding.",
}
# Those of the model `icons` that come out at every seed that was tried; `examples.webp` has seed 0 of each.
EXAMPLES = ("a red heart, 3d", "a cat, 3d", "a smiling face, 3d", "a globe, 3d", "a car, 3d", "a red apple, 3d")


def status(text: str, kind: str = "info", done: float = 0, of: int = 0) -> str:
    """A sentence for the visitor; `kind` is info, busy, done or error. With `of`, a bar of `done`."""
    role = "alert" if kind == "error" else "status"
    bar = f'<progress max="{of}" value="{done:.0f}" aria-label="tokens"></progress>' if of else ""
    return f'<div class="visar-status visar-{kind}" role="{role}"><p>{html.escape(text)}</p>{bar}</div>'


def progress(request: Request, runs: Sequence[Run], queued: int) -> str:
    """How far a request is, in tokens of all its images, and the time that is left at this pace."""
    total = request.tokens * len(runs)
    tokens = sum(request.tokens if run.done else run.at.committed for run in runs)
    if all(run.done for run in runs):
        passes = max(finished(run).passes for run in runs)
        seconds = sum(finished(run).seconds for run in runs)
        notes = request.model.model.family.notes([request.condition])
        said = f"Done: {passes} passes, {seconds:.2f} s of decoding."
        return status(" ".join([said, *notes]), "done", total, total)
    if not tokens:
        return status(f"Waiting for a free row; {queued} in line." if queued else "Starting.", "busy", 0, total)
    seconds = sum(run.at.seconds for run in runs)
    left = f", about {seconds / tokens * (total - tokens):.1f} s left" if tokens >= total / 10 else ""
    each = max(run.at.passes for run in runs)
    return status(f"{tokens:,} of {total:,} tokens, {each} passes{left}.", "busy", tokens, total)


def images(runs: Sequence[Run] = (), size: int = 1) -> str:
    """The images of one sampler in a grid that keeps its place; `size` squares where there are none yet."""
    cells = [_figure(run) for run in runs] or ['<div class="visar-empty">Your image appears here</div>'] * size
    columns = 1 if len(cells) == 1 else 2
    return f'<div class="visar-grid" style="--columns:{columns}">{"".join(cells)}</div>'


def result(request: Request, runs: Sequence[Run]) -> str:
    """Of finished images: what they are, and buttons to keep them, share them, and make them again."""
    first = request.recipe()
    what = f"<b>{html.escape(request.title)}</b> · seed <b data-seed>{request.seed}</b> · {html.escape(first.sampler)}"
    saves = "".join(
        f'<a class="visar-button" download="{request.recipe(run.number, run.image).file_name}" '
        f'href="{_png(request, run)}">Download{f" {run.image + 1}" if len(runs) > 1 else ""}</a>'
        for run in runs
    )
    last = request.recipe(0, request.images - 1)
    return (
        f'<p class="visar-what">{what}</p><div class="visar-actions">{saves}'
        f"{_copy('link', link_of(request))}{_copy('Python', last.python())}{_copy('command', last.command())}</div>"
    )


def details(request: Request, runs: Sequence[Run]) -> str:
    """The metrics of finished images, in words whether they are exact, the map of the first, and its curve."""
    done = [finished(run) for run in runs]
    passes, seconds = sum(f.passes for f in done) / len(done), sum(f.seconds for f in done)
    tiles = [
        ("NFE", f"{sum(f.nfe for f in done) / len(done):,.0f}", "passes for an image"),
        ("tokens per pass", f"{request.tokens / passes:.2f}", f"of {request.tokens:,} tokens"),
        ("ms per pass", f"{1000 * seconds / len(done) / passes:.2f}", "shared with others at work"),
        ("seconds", f"{seconds:.2f}", "in passes for you"),
    ]
    cells = "".join(
        f'<div><dt>{name}</dt><dd data-metric="{name}">{value}</dd><small>{what}</small></div>'
        for name, value, what in tiles
    )
    frame = runs[0].frame
    assert frame is not None
    return (
        f'{DETAILS}<dl class="visar-metrics">{cells}</dl>{exactness(request.samplers[0].name)}'
        f'<div class="visar-plots">{_map(frame)}{curves(request, runs[:1])}</div></details>'
    )


def curves(request: Request, runs: Sequence[Run]) -> str:
    """Committed tokens of finished images against passes and seconds, a curve for each sampler."""
    found = [Curve.of(request.labels[r.number], finished(r).commit_pass, finished(r).seconds) for r in runs]
    plot = to_svg(commit_curve(found, request.tokens))
    what = "committed tokens; dotted: one per pass"
    return f'<figure class="visar-curves">{plot}<figcaption>{what}</figcaption></figure>'


def racer(request: Request, run: Run | None, number: int, first: int | None = None) -> str:
    """One column of a race: its sampler, clock, passes and image, and whether it was `first`."""
    frame = None if run is None else run.frame
    at = Glance(0, 0, 0.0) if frame is None else frame.at
    place = ""
    if first is not None and frame is not None and frame.finished is not None:
        place = "first" if first == number else "second"
    badge = place and f'<span class="visar-place visar-place-{place}">{place}</span>'
    shown = images([] if run is None or frame is None else [run])
    return _column(request.labels[number], badge, at.seconds, at.passes, at.committed, request.tokens, shown)


def start(name: str) -> str:
    """A column before a race."""
    return _column(name, "", 0.0, 0, 0, 1, images())


def _column(name: str, badge: str, seconds: float, passes: int, tokens: int, of: int, image: str) -> str:
    return (
        f'<h3 class="visar-head">{html.escape(name)} {badge}</h3>'
        f'<dl class="visar-clock"><div><dt>seconds</dt><dd data-metric="seconds">{seconds:.2f}</dd></div>'
        f'<div><dt>passes</dt><dd data-metric="passes">{passes}</dd></div></dl>'
        f'<progress max="{of}" value="{tokens}" aria-label="tokens of {html.escape(name)}"></progress>{image}'
    )


def race(request: Request, runs: Sequence[Run]) -> str:
    """Where a race stands, or what it came to."""
    if not all(run.done for run in runs):
        total = request.tokens * len(runs)
        tokens = sum(run.frame.at.committed for run in runs if run.frame is not None)
        return status("Both decode the same prompt and seed.", "busy", tokens, total)
    quick, slow = sorted(runs, key=lambda run: finished(run).seconds)
    (a, quickest), (b, slowest) = ((request.labels[r.number], finished(r)) for r in (quick, slow))
    said = f"{a} was first: {quickest.seconds:.2f} s and {quickest.passes} passes, "
    return status(f"{said}against {slowest.seconds:.2f} s and {slowest.passes} passes of {b}.", "done", 1, 1)


def first_of(runs: Sequence[Run]) -> int | None:
    """The number of the sampler that took least time, once it is clear."""
    done = [run for run in runs if run.done]
    return min(done, key=lambda run: finished(run).seconds).number if done else None


def race_details(request: Request, runs: Sequence[Run]) -> str:
    """After a race: whether each is exact, the curves, and a link."""
    kinds = exactness(*dict.fromkeys(sampler.name for sampler in request.samplers))
    return (
        f'<div class="visar-actions">{_copy("link", link_of(request))}</div>{kinds}'
        '<p class="visar-note">The clock counts a sampler\'s own passes. Equal seeds need not give equal images: exact '
        f"means that all seeds together have one distribution.</p>{curves(request, runs)}"
    )


def exactness(*samplers: str) -> str:
    """Whether samplers are exact: a sentence for each kind."""
    kinds: dict[str, list[str]] = {}
    for sampler in samplers:
        kinds.setdefault(spec_of(sampler).exactness, []).append(f"<b>{html.escape(sampler)}</b>")
    return "".join(
        f'<p class="visar-exactness">{" and ".join(names)} · <span class="visar-{_mark(kind)}">'
        f"{html.escape(IN_WORDS.get(kind, f'{kind.capitalize()}.'))}</span></p>"
        for kind, names in kinds.items()
    )


def _mark(kind: str) -> str:
    return "relaxed" if kind == "relaxed" else "exact"


def explained(sampler: str) -> str:
    """A chosen sampler in a line of its own."""
    line, mark = html.escape(words.line_of(sampler)), _mark(spec_of(sampler).exactness)
    return f'<p class="visar-line"><span class="visar-{mark}">{words.short_kind(sampler)}</span> {line}</p>'


def samplers(model: DemoModel, speeds: words.Speeds) -> str:
    """All samplers of a model in their groups, with what an image took here."""
    parts = ['<p class="visar-note">Passes and seconds are those of images made here since the server started.</p>']
    for number, group in enumerate(words.GROUPS):
        rows = "".join(
            f"<tr><th scope=row>{html.escape(name)}</th><td>{html.escape(words.line_of(name))}</td>"
            f"<td>{speeds.told(model.name, name)}</td></tr>"
            for name in words.ordered(model.samplers)
            if words.group_of(name) == number
        )
        if rows:
            names = "".join(f"<th scope=col>{name}</th>" for name in ("sampler", "what it does", "per image"))
            head = f"<thead><tr>{names}</tr></thead>"
            parts.append(f'<h3>{group}</h3><table class="visar-table">{head}<tbody>{rows}</tbody></table>')
    return "".join(parts)


@cache
def examples() -> str:
    """Prompts to try, each with a thumbnail."""
    file = resources.files("visar.demo").joinpath("examples.webp").read_bytes()
    strip = f"url(data:image/webp;base64,{base64.b64encode(file).decode()})"
    chips = "".join(
        f'<button type="button" data-prompt="{html.escape(text)}"><i style="--at:{number}"></i>'
        f"<span>{html.escape(text.partition(',')[0].removeprefix('a '))}</span></button>"
        for number, text in enumerate(EXAMPLES)
    )
    return f'<div class="visar-examples" style="--strip:{strip}">{chips}</div>'


GALLERY = (
    '<h3>This visit</h3><div id="visar-gallery" class="visar-gallery" aria-label="Images of this visit">'
    "<p>Your images stay here until you leave the page.</p></div>"
)
RESULT = (  # before the first image
    '<p class="visar-what">Keep it, share it, or make it again:</p><div class="visar-actions">'
    + "".join(
        f'<button type="button" class="visar-button" disabled>{what}</button>'
        for what in ("Download", "Copy link", "Copy Python", "Copy command")
    )
    + "</div>"
)
LATER = '<div class="visar-empty">Afterwards: how many tokens each had at what time</div>'  # before a race
DETAILS = '<details class="visar-details"><summary>How it was decoded</summary>'
SMOOTH = '<label class="visar-smooth"><input type="checkbox" id="visar-smooth"> Smooth pixels</label>'


def _figure(run: Run) -> str:
    """An image; a finished one is a link that saves it."""
    if run.frame is None:
        return '<div class="visar-empty">Starting</div>'
    request, title = run.request, html.escape(f"{run.request.title}, seed {run.request.seed}, image {run.image + 1}")
    if run.frame.finished is None:
        source = _uri(run.frame.image, "WEBP", quality=80)
        return f'<img class="visar-image" src="{source}" alt="{title}, being decoded">'
    source, name = _png(request, run), request.recipe(run.number, run.image).file_name
    shown = f'<img class="visar-image" src="{source}" alt="{title}">'
    return f'<a href="{source}" download="{name}" title="Save as PNG" data-result="{title}">{shown}</a>'


def _map(frame: Frame) -> str:
    try:
        plot = to_svg(heat_map(frame.event.commit_pass))
    except ValueError:  # of images that are not square
        return ""
    return f'<figure class="visar-map">{plot}<figcaption>bright cells came many in a pass</figcaption></figure>'


def _copy(what: str, text: str) -> str:
    return f'<button type="button" class="visar-button" data-copy="{html.escape(text)}">Copy {what}</button>'


def finished(run: Run) -> Finished:
    """What a run that is done came to."""
    assert run.frame is not None and run.frame.finished is not None
    return run.frame.finished


def _png(request: Request, run: Run) -> str:
    assert run.frame is not None
    return _uri(run.frame.image, "PNG", pnginfo=request.recipe(run.number, run.image).info())


def _uri(image: Image.Image, form: str, **options: object) -> str:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)  # type: ignore[arg-type]
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
