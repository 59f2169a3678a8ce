"""Frames as HTML that loads nothing: images, maps, curves, metrics and sentences."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from types import MappingProxyType

from PIL import Image

from visar.demo.jobs import Frame
from visar.demo.requests import Request
from visar.generation.stats import DecodeStats, MaskedStats
from visar.viz import Curve, commit_curve, heat_map, to_svg

IN_WORDS = {
    "exact": "Exact: images have the distribution of plain sampling.",
    "relaxed": "Relaxed: images do not have the distribution of plain sampling.",
}


def images(request: Request | None, frame: Frame | None, label: str = "", most: int | None = None) -> str:
    """Each image next to its map of accepted tokens per pass, under the heading `label`.

    The colours of the map end at `most` tokens.
    """
    if frame is None or request is None:
        what = f"{label}: waits for the other" if label else "Images appear here while they are decoded"
        return f'<div class="visar-empty">{html.escape(what)}.</div>'
    cells = []
    most = most or frame.most
    for i, image in enumerate(frame.images):
        title = html.escape(f"{request.title}, seed {request.seed}, image {i + 1}")
        name = html.escape(f"visar-seed{request.seed}-{i + 1}.png")
        done = frame.stats is not None
        source = _data_uri(image, "PNG" if done else "WEBP")
        shown = f'<img class="visar-image" src="{source}" alt="{title}">'
        if done:
            shown = f'<a href="{source}" download="{name}" title="Save as PNG">{shown}</a>'
        caption = f"image {i + 1}" if len(frame.images) > 1 else ("click to save it" if done else "being decoded")
        plot = to_svg(heat_map(frame.commit_pass, i, most=most, missing="given" if done else "not yet"))
        cells.append(
            f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"
            f'<figure class="visar-map">{plot}<figcaption>tokens accepted by each pass</figcaption></figure>'
        )
    head = f'<h4 class="visar-head">{html.escape(label)}</h4>' if label else ""
    return head + "".join(f'<div class="visar-row">{cell}</div>' for cell in cells)


def curves(frames: Mapping[str, Frame], length: int) -> str:
    """Committed tokens against passes and seconds, a curve for each sampler."""
    runs = [
        Curve(label, frame.passes, frame.tokens, frame.seconds)  # type: ignore[arg-type]
        for label, frame in frames.items()
    ]
    return f'<div class="visar-curves">{to_svg(commit_curve(runs, length))}</div>' if runs else ""


def metrics(stats: DecodeStats | None) -> str:
    """The metrics of a decoding with units, and whether it is exact; empty before its end."""
    if stats is None:
        return ""
    tiles = [
        ("NFE", f"{stats.nfe:,}", "model passes"),
        ("tokens per pass", f"{stats.tokens_per_pass:.2f}", f"of {stats.tokens:,} tokens"),
        ("ms per pass", f"{stats.ms_per_pass:.2f}", "on average" if stats.draft_seconds == 0 else "drafting included"),
        ("seconds", f"{stats.seconds:.2f}", "of decoding" + _capture(stats)),
    ]
    if isinstance(stats, MaskedStats):
        tiles.append(("denoiser calls per pass", f"{stats.calls_per_pass:.1f}", f"of {stats.denoising_steps} steps"))
    cells = "".join(
        f'<div><dt>{name}</dt><dd data-metric="{name}">{value}</dd><small>{what}</small></div>'
        for name, value, what in tiles
    )
    kind = exactness(stats.sampler, stats.exactness)
    return f'<dl class="visar-metrics">{cells}</dl><p class="visar-exactness">{kind}</p>'


def exactness(name: str, kind: str) -> str:
    """A sampler and whether it is exact, in words."""
    said = IN_WORDS.get(kind, f"{kind[:1].upper()}{kind[1:]}.")
    mark = "relaxed" if kind == "relaxed" else "exact"
    return f'<b>{html.escape(name)}</b> <span class="visar-{mark}">{html.escape(said)}</span>'


def ratio(frames: Mapping[str, Frame]) -> str:
    """A sentence that compares passes and time of two runs; empty before both are done."""
    done = [(name, frame.stats) for name, frame in frames.items() if frame.stats is not None]
    if len(done) < 2:
        return ""
    (left, base), (right, other) = done
    passes, seconds = other.nfe / base.nfe, _seconds(other) / _seconds(base)
    text = (
        f'<p class="visar-ratio"><b>{html.escape(right)}</b> against <b>{html.escape(left)}</b>: '
        f'<b data-metric="NFE ratio">{passes:.2f}</b> of the passes ({other.nfe} and {base.nfe}), '
        f'<b data-metric="time ratio">{seconds:.2f}</b> of the time '
        f"({_seconds(other):.2f} s and {_seconds(base):.2f} s). One run on this machine, one after the other.</p>"
    )
    if base.exact and other.exact:
        text += (
            "<p>Both are exact. Equal seeds need not give equal images: exact means that the images of all seeds "
            "together have one distribution, not that two samplers give the same image.</p>"
        )
    return text


def progress(label: str, frame: Frame, others: Mapping[str, Frame] = MappingProxyType({})) -> str:
    """The progress of a sampler, and whether it and the `others` are done."""
    if frame.stats is None:
        return status(f"{label}: {frame.passes[-1]} passes, {frame.tokens[-1]:.0f} tokens.", "busy")
    said = f"{label}: done, {frame.stats.nfe} passes in {frame.stats.seconds:.2f} seconds."
    if len(others) > 1 and all(other.stats for other in others.values()):
        said = f"All done: {' and '.join(others)}."
    return status(" ".join([said, *frame.notes]), "done")


def status(text: str, kind: str = "info") -> str:
    """A sentence for the visitor; `kind` is info, busy, done or error."""
    role = "alert" if kind == "error" else "status"
    return f'<p class="visar-status visar-{kind}" role="{role}">{html.escape(text)}</p>'


def _seconds(stats: DecodeStats) -> float:
    return stats.seconds - stats.capture_seconds


def _capture(stats: DecodeStats) -> str:
    return f", {stats.capture_seconds:.2f} of them to make a CUDA graph, once" if stats.capture_seconds else ""


def _data_uri(image: Image.Image, form: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, form, **({"quality": 85} if form == "WEBP" else {}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
