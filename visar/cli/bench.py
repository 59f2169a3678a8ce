"""`visar bench`: passes and time per pass of several samplers, interleaved in one run."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from visar.cli.common import load_pipeline, samplers_of
from visar.errors import VisarError
from visar.files import replacing, writable_folder
from visar.tables import table

if TYPE_CHECKING:
    from visar.eval.speed import SpeedReport, SpeedRow


SETTINGS = ("seed", "guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p")


def bench(options: argparse.Namespace) -> int:
    from visar.eval.speed import compare

    for name, value in (("--batch", options.batch), ("--images", options.images), ("--repeats", options.repeats)):
        if value < 1:
            raise VisarError(f"{name} must be 1 or more, not {value}.")
    samplers = samplers_of(options)
    if options.json:
        writable_folder(Path(options.json).parent)  # before minutes of measuring
    pipe = load_pipeline(options)
    pipe.set_progress_bar_config(disable=True)
    settings = {name: getattr(options, name) for name in SETTINGS}
    report = compare(
        pipe, samplers, batch=options.batch, images=options.images, repeats=options.repeats, **settings
    )  # fmt: skip
    _print_speed(report, options.model)
    if options.json:
        with replacing(options.json) as temporary:
            temporary.write_text(json.dumps(asdict(report), indent=2) + "\n")
    return 0


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
