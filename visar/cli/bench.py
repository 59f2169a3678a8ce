"""`visar bench`: passes and time per pass of several samplers, interleaved in one run; or what a pass is made of."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visar.cli.common import LOAD, default_of, load_model, samplers_of
from visar.cli.output import show
from visar.cli.parsers.base import STDOUT
from visar.cli.parsers.options import params_of, settings_of
from visar.errors import VisarError
from visar.files import check_output
from visar.params import SamplingParams
from visar.tables import table

if TYPE_CHECKING:
    from visar.eval.benchmark.history import BenchmarkRun
    from visar.eval.benchmark.profiling import PassProfile
    from visar.eval.benchmark.speed import SpeedReport, SpeedRow
    from visar.serving.load import LoadReport


UNGIVEN = {"model": "icons", "seed": 0}  # what options are that are not given, if not None


def bench(options: argparse.Namespace) -> int:
    if (options.history or options.against) and (options.shapes is not None or options.profile or options.serve):
        raise VisarError("--history and --against are of samplers: not of --shapes, --profile or --serve.")
    if options.minutes is not None and not options.serve:
        raise VisarError("--minutes are those of the soak of --serve.")
    unused = ("num_images",) if options.shapes is not None else ("repeats",) if options.serve else ()
    _refuse(options, ("num_images", "repeats") if options.profile else unused)
    options.num_images, options.repeats = options.num_images or 16, options.repeats or 3
    if options.serve:
        return _serve(options)
    if options.shapes is not None:
        return _shapes(options)
    samplers = samplers_of(options)
    if not samplers:
        raise VisarError("No sampler was given.")
    before = _history(options)
    settings = settings_of(params_of(options))
    model = load_model(options, samplers=samplers.values())
    model.bar = {"disable": True}
    if options.profile:
        return _profile(options, model, samplers, settings)
    from visar.eval.benchmark.speed import compare

    batch = options.batch or 1
    report = compare(model, samplers, batch=batch, images=options.num_images, repeats=options.repeats, **settings)
    show(options, _speed_text(report, options.model), asdict(report))
    _remember(options, report, before)
    return 0


def _refuse(options: argparse.Namespace, names: Iterable[str]) -> None:
    """Raise `VisarError` for an option of these that is given: what is measured does not depend on it."""
    for name in names:
        if getattr(options, name) not in (None, UNGIVEN.get(name)):  # False, as of --no-ema, is given too
            mode = "--profile" if options.profile else "--serve" if options.serve else "--shapes"
            raise VisarError(f"{mode} takes no --{name.replace('_', '-')}, which would change nothing.")


def _shapes(options: argparse.Namespace) -> int:
    """`visar bench --shapes`."""
    for name in ("samplers", "vq", "vae", "drafter", "parameters"):
        if getattr(options, name):
            raise VisarError(
                "--shapes measures ar and scd with random weights: it takes no samplers, model or drafter."
            )
    settings = [f.name for f in fields(SamplingParams) if f.metadata["flag"] and f.name != "invariant"]
    _refuse(options, [*UNGIVEN, *LOAD, *settings])
    import torch

    from visar.devices import device_of
    from visar.eval.benchmark.shapes import WINDOWS, measure, shape_named, shapes_text
    from visar.kernels.invariant import invariant

    with invariant(bool(options.invariant)):
        report = measure(
            [shape_named(name) for name in options.shapes] or None,
            batches=None if options.batch is None else (options.batch,),
            windows=WINDOWS if options.window is None else (1, options.window),
            dtypes=None if options.dtype is None else (getattr(torch, options.dtype),),
            device=device_of(options.device),
            repeats=options.repeats,
        )
    show(options, shapes_text(report), asdict(report))
    return 0


def _profile(options: argparse.Namespace, model: Any, samplers: Mapping[str, Any], settings: dict[str, Any]) -> int:
    """`visar bench --profile`."""
    from visar.eval.benchmark.profiling import profile_model, profile_text
    from visar.kernels.invariant import invariant

    if options.batch not in (None, 1):
        raise VisarError("--profile is of one image: it takes no --batch.")
    with invariant(bool(settings.get("invariant"))):
        rows = {label: profile_model(model, sampler, **settings) for label, sampler in samplers.items()}
    report = ProfileReport(options.model, str(model.device), str(model.dtype), rows)
    show(options, profile_text(list(rows.items()), ("SAMPLER",)), asdict(report))
    return 0


def _serve(options: argparse.Namespace) -> int:
    """`visar bench --serve`."""
    from visar.cli.serve import require_server

    require_server()
    from visar.serving.load import measure_load

    if options.samplers is None:
        options.samplers = [default_of(options)]
    if len(samplers := samplers_of(options)) != 1:
        raise VisarError("--serve measures one sampler; give one with --samplers.")
    settings = settings_of(params_of(options))
    report = measure_load(
        load_model(options, samplers=samplers.values()), next(iter(samplers.values())), rows=options.batch or 8,
        images=options.num_images, minutes=0.5 if options.minutes is None else options.minutes, **settings,
    )  # fmt: skip
    show(options, _load_text(report, options.model), asdict(report))
    return 0


def _load_text(report: LoadReport, model: str) -> str:
    rows = [
        (
            r.load, r.system, r.images, f"{r.images_per_second:.2f}", f"{r.p50:.2f}", f"{r.p99:.2f}",
            "-" if r.first_partial is None else f"{r.first_partial:.2f}", f"{100 * r.idle:.0f}%",
        )
        for r in report.table
    ]  # fmt: skip
    text = table(("LOAD", "SYSTEM", "IMAGES", "IMAGES/S", "P50 S", "P99 S", "FIRST PARTIAL S", "IDLE ROWS"), rows)
    text += (
        f"\n{model}, {report.sampler}, {report.rows} rows, {report.device}, {report.dtype}; Poisson arrivals are in "
        f"shares of the server's capacity, {report.capacity:.2f} images/s in this run."
    )
    if (soak := report.soak) is not None:
        text += (
            f"\nAfter {soak.images} more images in {soak.minutes:g} minutes the process has {soak.after:.0f} MiB in "
            f"memory, before {soak.before:.0f} MiB."
        )
    return text


NOT_COMPARED = {
    "parser",
    "json",
    "history",
    "against",
    "samplers",
    "device",
    "dtype",
    "shapes",
    "profile",
    "repeats",
    "serve",
    "minutes",
}


def _history(options: argparse.Namespace) -> list[BenchmarkRun]:
    """The runs of --against, read before minutes of measuring."""
    if options.history:
        check_output(options.history)
    if not options.history and not options.against:
        return []
    from visar.eval.benchmark import history

    if options.history and Path(options.history).is_file():
        history.load(options.history)  # an error where it is another file
    if options.against and (options.against != options.history or Path(options.against).exists()):
        return history.load(options.against)
    return []


def _remember(options: argparse.Namespace, report: SpeedReport, before: list[BenchmarkRun]) -> None:
    """Append the run to --history, and print the comparison that --against asks for."""
    if not options.history and not options.against:
        return
    from visar.eval.benchmark import history

    run = history.run_of(report, {k: v for k, v in vars(options).items() if k not in NOT_COMPARED})
    if options.against:
        print(history.comparison(run, before), file=sys.stderr if options.json == STDOUT else sys.stdout)
    if options.history:
        history.append(options.history, run)


@dataclass(frozen=True)
class ProfileReport:
    """What `visar bench --profile --json` writes: a mean pass of each sampler."""

    model: str
    device: str
    dtype: str
    rows: dict[str, PassProfile]


def _speed_text(report: SpeedReport, model: str) -> str:
    first = report.rows[0].sampler
    if report.rows[0].head is None:
        shape: tuple[str, ...] = ("W",)
        more: tuple[str, ...] = ("DRAFTER PASSES", "IMAGES/S", "GB/S", "OF BANDWIDTH")
    else:
        shape = ("K", "T")
        more = ("DENOISER CALLS/PASS", "DENOISER CALLS/TOKEN", "DENOISED ROWS/TOKEN", "ACCEPTANCE RATE")

    def special(r: SpeedRow) -> tuple[tuple[object, ...], tuple[object, ...]]:
        if (h := r.head) is None:
            of = 100 * r.gb_per_second / report.bandwidth
            drafts = "-" if r.draft_passes is None else f"{r.draft_passes:.1f}"
            return (r.window,), (drafts, f"{r.images_per_second:.2f}", f"{r.gb_per_second:.1f}", f"{of:.0f}%")
        return (h.steps or "", h.denoising_steps), (
            f"{h.calls_per_pass:.1f}",
            f"{h.calls_per_token:.1f}",
            f"{h.evaluations_per_token:.0f}",
            "" if h.acceptance is None else f"{h.acceptance:.3f}",
        )

    rows = []
    for r in report.rows:
        sizes, rest = special(r)
        drafting = "-" if r.draft_share is None else f"{100 * r.draft_share:.0f}%"
        rows.append((
            r.sampler, "yes" if r.exact else "no", *sizes, f"{r.nfe:.1f}", f"{r.tokens_per_pass:.2f}",
            f"{r.ms_per_pass:.2f}", drafting, f"{r.seconds_per_image:.3f}", *rest,
            f"{r.nfe_ratio:.2f}", f"{r.time_ratio:.2f}",
        ))  # fmt: skip
    passes = ("NFE", "TOKENS/PASS", "MS/PASS", "DRAFTING", "S/IMAGE")
    rows_text = table(("SAMPLER", "EXACT", *shape, *passes, *more, f"NFE/{first}", f"TIME/{first}"), rows)
    mode = ", invariant" if report.invariant else ""
    notes = [f"{r.sampler}: {r.exactness}.\n" for r in report.rows if r.exactness not in ("exact", "relaxed", "")]
    return (
        f"{rows_text}\n{''.join(notes)}{model}, {report.device}, {report.dtype}{mode}, batch {report.batch}, "
        f"{report.images} images, "
        f"medians of {report.repeats} repeats after a warm-up; bandwidth measured in this run: "
        f"{report.bandwidth:.1f} GB/s."
    )
