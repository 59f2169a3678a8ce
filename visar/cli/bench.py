"""`visar bench`: passes and time per pass of several samplers, interleaved in one run."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visar.cli.common import configured, device_of, is_masked, load_pipeline
from visar.errors import VisarError
from visar.files import replacing, writable_folder
from visar.tables import table

if TYPE_CHECKING:
    from torch import Tensor

    from visar.eval.quality import QualityRow
    from visar.eval.speed import SpeedReport, SpeedRow
    from visar.samplers import AnySampler
    from visar.training.data import PictureSet


SETTINGS = ("seed", "guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p")


def bench(options: argparse.Namespace) -> int:
    from visar.eval.extractors.lite0 import lite0
    from visar.eval.quality import quality
    from visar.eval.speed import compare
    from visar.training.data import PictureSet

    for name, value in (("--batch", options.batch), ("--images", options.images), ("--repeats", options.repeats)):
        if value < 1:
            raise VisarError(f"{name} must be 1 or more, not {value}.")
    samplers = _samplers(options)
    if options.quality == 1 or options.quality < 0:
        raise VisarError(f"--quality must be 2 or more pictures, not {options.quality}.")
    if options.real and not options.quality:
        raise VisarError("--real needs --quality, the number of pictures to compare for each prompt.")
    if not options.real and (options.styles or options.without_groups):
        raise VisarError("--styles and --without-groups choose from the pictures of --real, and none were given.")
    if options.json:
        writable_folder(Path(options.json).parent)  # before minutes of measuring
    extract = lite0(device_of(options.device)) if options.quality else None
    data = PictureSet(options.real, tuple(options.styles), tuple(options.without_groups)) if options.real else None
    pipe = load_pipeline(options)
    pipe.set_progress_bar_config(disable=True)
    wanted, real = _wanted(options, pipe, data) if options.quality else ([], None)
    settings = {name: getattr(options, name) for name in SETTINGS}
    report = compare(
        pipe, samplers, batch=options.batch, images=options.images, repeats=options.repeats, **settings
    )  # fmt: skip
    _print_speed(report, options.model)
    figures = asdict(report)
    _write(options.json, figures)
    if extract is not None:
        rows_of_quality = quality(pipe, samplers, wanted, extract, each=options.quality, real=real, **settings)
        _print_quality(rows_of_quality, options.quality, len(wanted))
        _write(options.json, figures | {"quality": [asdict(row) for row in rows_of_quality]})
    return 0


def _samplers(options: argparse.Namespace) -> dict[str, AnySampler]:
    """The samplers by what they were called: a name, or a name with parameters, as in "mar:steps=32:head_steps=50".

    Parameters of --set go to all that have them.
    """
    from visar.samplers import spec_of

    wanted = options.samplers
    if wanted is None:
        wanted = ["mar", "mar-headspec"] if is_masked(options) else ["ar", "sjd", "scd"]
    parts = {label: label.split(":") for label in wanted}
    has = {label: set(spec_of(name).parameters()) for label, (name, *_) in parts.items()}
    for text in options.parameters:
        if "=" in text and not any(text.partition("=")[0] in names for names in has.values()):
            raise VisarError(f"None of these samplers has a parameter {text.partition('=')[0]!r}.")
    if options.window is not None and not any("window" in names for names in has.values()):
        raise VisarError("None of these samplers has a window.")
    return {
        label: configured(
            name,
            [text for text in options.parameters if "=" not in text or text.partition("=")[0] in has[label]] + own,
            options.window if "window" in has[label] else None,
        )
        for label, (name, *own) in parts.items()
    }


def _print_speed(report: SpeedReport, model: str) -> None:
    first = report.rows[0].sampler
    if report.rows[0].head is None:
        shape: tuple[str, ...] = ("W",)
        more: tuple[str, ...] = ("IMAGES/S", "GB/S", "OF BANDWIDTH")
    else:
        shape = ("K", "T")
        more = ("HEAD ROUNDS/PASS", "HEAD ROUNDS/TOKEN", "HEAD EVALUATIONS/TOKEN", "ACCEPTANCE")

    def special(r: SpeedRow) -> tuple[tuple[object, ...], tuple[object, ...]]:
        if (h := r.head) is None:
            of = 100 * r.gb_per_second / report.bandwidth
            return (r.window,), (f"{r.images_per_second:.2f}", f"{r.gb_per_second:.1f}", f"{of:.0f}%")
        return (h.steps or "", h.head_steps), (
            f"{h.rounds_per_pass:.1f}", f"{h.rounds_per_token:.1f}", f"{h.evaluations_per_token:.0f}",
            "" if h.acceptance is None else f"{h.acceptance:.3f}",
        )  # fmt: skip

    rows = []
    for r in report.rows:
        sizes, rest = special(r)
        rows.append((
            r.sampler, "exact" if r.exact else "not exact", *sizes, f"{r.nfe:.1f}", f"{r.commits_per_pass:.2f}",
            f"{r.ms_per_pass:.2f}", f"{100 * r.draft_share:.0f}%", f"{r.seconds_per_image:.3f}", *rest,
            f"{r.nfe_ratio:.2f}", f"{r.time_ratio:.2f}",
        ))  # fmt: skip
    passes = ("NFE", "TOKENS/PASS", "MS/PASS", "DRAFTING", "S/IMAGE")
    print(table(("SAMPLER", "LAW", *shape, *passes, *more, f"NFE/{first}", f"TIME/{first}"), rows))
    print(
        f"{model}, {report.device}, {report.dtype}, batch {report.batch}, {report.images} pictures, medians "
        f"of {report.repeats} repeats after a warm-up; bandwidth measured in this run: {report.bandwidth:.1f} GB/s."
    )


def _write(file: str | None, figures: dict[str, Any]) -> None:
    if file:
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(figures, indent=2) + "\n")


def _wanted(options: argparse.Namespace, pipe: Any, data: PictureSet | None) -> tuple[list[Any], Tensor | None]:
    """The prompts or classes to compare the pictures of, and real pictures of them where there are any."""
    from visar.eval.quality import PROMPTS, real_pictures
    from visar.eval.speed import conditions
    from visar.pipelines import TextToImagePipeline

    if data is None:
        found, real = conditions(pipe, PROMPTS), None
    elif isinstance(pipe, TextToImagePipeline):
        found, real = real_pictures(data, pipe.pixels, options.seed)
    else:
        raise VisarError("--real compares by prompts, and this model draws classes.")
    found = list(dict.fromkeys(found))
    if len(found) < 2:
        raise VisarError("Quality is compared over 2 or more prompts or classes, and there are not as many.")
    return found, real


def _print_quality(rows: list[QualityRow], each: int, prompts: int) -> None:
    print()
    print(table(
        ("SAMPLER", f"MOVED FROM {rows[0].sampler.upper()}", "STANDARD ERROR", "FROM REAL"),
        [(r.sampler, f"{r.moved:.3f}", f"{r.error:.3f}", "" if r.real is None else f"{r.real:.3f}") for r in rows],
    ))  # fmt: skip
    print(
        f"Energy distances of EfficientNet-lite0 features, {each} pictures of each of {prompts} prompts; the first row "
        f"is {rows[0].sampler} under another seed."
    )
