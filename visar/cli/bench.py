"""`visar bench`: passes and time per pass of several samplers, interleaved in one run."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from visar.cli.common import configured, load_pipeline
from visar.errors import VisarError
from visar.files import replacing, writable_folder
from visar.tables import table


def bench(options: argparse.Namespace) -> int:
    from visar.eval.speed import compare
    from visar.samplers import SAMPLERS, get_sampler

    for name, value in (("--batch", options.batch), ("--images", options.images), ("--repeats", options.repeats)):
        if value < 1:
            raise VisarError(f"{name} must be 1 or more, not {value}.")
    made = [get_sampler(name).name for name in options.samplers]
    has = {name: set(SAMPLERS[name].parameters()) for name in made}
    for text in options.parameters:
        if "=" in text and not any(text.partition("=")[0] in names for names in has.values()):
            raise VisarError(f"None of these samplers has a parameter {text.partition('=')[0]!r}.")
    samplers = {
        name: configured(
            name,
            [text for text in options.parameters if "=" not in text or text.partition("=")[0] in names],
            options.window if "window" in names else None,
        )
        for name, names in has.items()
    }
    if options.json:
        writable_folder(Path(options.json).parent)  # before minutes of measuring
    pipe = load_pipeline(options)
    pipe.set_progress_bar_config(disable=True)
    report = compare(
        pipe, samplers, batch=options.batch, images=options.images, repeats=options.repeats, seed=options.seed,
        guidance_scale=options.guidance_scale, temperature=options.temperature, top_k=options.top_k,
        top_p=options.top_p,
    )  # fmt: skip
    rows = [
        (r.sampler, "exact" if r.exact else "not exact", r.window, f"{r.nfe:.1f}", f"{r.commits_per_pass:.2f}",
         f"{r.ms_per_pass:.2f}", f"{100 * r.draft_share:.0f}%", f"{r.seconds_per_image:.3f}",
         f"{r.images_per_second:.2f}", f"{r.gb_per_second:.1f}", f"{100 * r.gb_per_second / report.bandwidth:.0f}%",
         f"{r.nfe_ratio:.2f}", f"{r.time_ratio:.2f}")
        for r in report.rows
    ]  # fmt: skip
    print(table(
        ("SAMPLER", "LAW", "W", "NFE", "TOKENS/PASS", "MS/PASS", "DRAFTING", "S/IMAGE", "IMAGES/S", "GB/S",
         "OF BANDWIDTH", f"NFE/{report.rows[0].sampler}", f"TIME/{report.rows[0].sampler}"), rows,
    ))  # fmt: skip
    print(
        f"{options.model}, {report.device}, {report.dtype}, batch {options.batch}, {options.images} pictures, medians "
        f"of {options.repeats} repeats after a warm-up; bandwidth measured in this run: {report.bandwidth:.1f} GB/s."
    )
    if options.json:
        with replacing(options.json) as temporary:
            temporary.write_text(json.dumps(asdict(report), indent=2) + "\n")
    return 0
