"""`visar bench`: passes and time per pass of several samplers, interleaved in one run; or what a pass is made of."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visar.cli.common import load_model, samplers_of
from visar.errors import VisarError
from visar.files import replacing, writable_folder
from visar.tables import table

if TYPE_CHECKING:
    from visar.eval.benchmark.profiling import PassProfile
    from visar.eval.benchmark.speed import SpeedReport, SpeedRow


SETTINGS = ("seed", "guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p")


def bench(options: argparse.Namespace) -> int:
    batch = 1 if options.batch is None else options.batch
    for name, value in (("--batch", batch), ("--images", options.images), ("--repeats", options.repeats)):
        if value < 1:
            raise VisarError(f"{name} must be 1 or more, not {value}.")
    if options.shapes is not None:
        return _shapes(options)
    samplers = samplers_of(options)
    if not samplers:
        raise VisarError("No sampler was given.")
    _check_report(options)
    pipe = load_model(options)
    pipe.bar = {"disable": True}
    settings = {name: getattr(options, name) for name in SETTINGS}
    if options.profile:
        return _profile(options, pipe, samplers, settings)
    from visar.eval.benchmark.speed import compare

    report = compare(pipe, samplers, batch=batch, images=options.images, repeats=options.repeats, **settings)
    _print_speed(report, options.model)
    _write_report(options, report)
    return 0


def _shapes(options: argparse.Namespace) -> int:
    """`visar bench --shapes`."""
    for name in ("samplers", "vq", "vae", "drafter", "parameters"):
        if getattr(options, name):
            raise VisarError(
                "--shapes measures ar and scd with random weights: it takes no samplers, model or drafter."
            )
    _check_report(options)
    import torch

    from visar.cli.common import device_of
    from visar.eval.benchmark.shapes import WINDOWS, measure, shape_named, shapes_text

    report = measure(
        [shape_named(name) for name in options.shapes] or None,
        batches=None if options.batch is None else (options.batch,),
        windows=WINDOWS if options.window is None else (1, options.window),
        dtypes=None if options.dtype is None else (getattr(torch, options.dtype),),
        device=device_of(options.device),
        repeats=options.repeats,
    )
    print(shapes_text(report))
    _write_report(options, report)
    return 0


def _profile(options: argparse.Namespace, pipe: Any, samplers: Mapping[str, Any], settings: dict[str, Any]) -> int:
    """`visar bench --profile`."""
    from visar.eval.benchmark.profiling import profile_model, profile_text

    if options.batch not in (None, 1):
        raise VisarError("--profile is of one image: it takes no --batch.")
    rows = {label: profile_model(pipe, sampler, **settings) for label, sampler in samplers.items()}
    print(profile_text([(label, p) for label, p in rows.items()], ("SAMPLER",)))
    _write_report(options, ProfileReport(options.model, str(pipe.device), str(pipe.dtype), rows))
    return 0


@dataclass(frozen=True)
class ProfileReport:
    """What `visar bench --profile --json` writes: a mean pass of each sampler."""

    model: str
    device: str
    dtype: str
    rows: dict[str, PassProfile]


def _check_report(options: argparse.Namespace) -> None:
    if options.json:
        writable_folder(Path(options.json).parent)  # before minutes of measuring


def _write_report(options: argparse.Namespace, report: Any) -> None:
    if options.json:
        with replacing(options.json) as temporary:
            temporary.write_text(json.dumps(asdict(report), indent=2) + "\n")


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
        drafting = "-" if r.draft_share is None else f"{100 * r.draft_share:.0f}%"
        rows.append((
            r.sampler, "exact" if r.exact else "not exact", *sizes, f"{r.nfe:.1f}", f"{r.tokens_per_pass:.2f}",
            f"{r.ms_per_pass:.2f}", drafting, f"{r.seconds_per_image:.3f}", *rest,
            f"{r.nfe_ratio:.2f}", f"{r.time_ratio:.2f}",
        ))  # fmt: skip
    passes = ("NFE", "TOKENS/PASS", "MS/PASS", "DRAFTING", "S/IMAGE")
    print(table(("SAMPLER", "LAW", *shape, *passes, *more, f"NFE/{first}", f"TIME/{first}"), rows))
    print(
        f"{model}, {report.device}, {report.dtype}, batch {report.batch}, {report.images} images, medians "
        f"of {report.repeats} repeats after a warm-up; bandwidth measured in this run: {report.bandwidth:.1f} GB/s."
    )
