"""`visar bench`: passes and time per pass of several samplers, interleaved in one run."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visar.cli.common import configured, device_of, load_pipeline
from visar.errors import VisarError
from visar.files import replacing, writable_folder
from visar.tables import table

if TYPE_CHECKING:
    from torch import Tensor

    from visar.eval.quality import QualityRow
    from visar.training.data import PictureSet


def bench(options: argparse.Namespace) -> int:
    from visar.eval.features import lite0
    from visar.eval.quality import quality
    from visar.eval.speed import compare
    from visar.samplers import SAMPLERS, get_sampler
    from visar.training.data import PictureSet

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
    settings = {name: getattr(options, name) for name in ("seed", "guidance_scale", "temperature", "top_k", "top_p")}
    report = compare(
        pipe, samplers, batch=options.batch, images=options.images, repeats=options.repeats, **settings
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
    figures = asdict(report)
    _write(options.json, figures)
    if extract is not None:
        rows_of_quality = quality(pipe, samplers, wanted, extract, each=options.quality, real=real, **settings)
        _print_quality(rows_of_quality, options.quality, len(wanted))
        _write(options.json, figures | {"quality": [asdict(row) for row in rows_of_quality]})
    return 0


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
        found, real = real_pictures(data, pipe.grid * pipe.vq.sizes.downsample, options.seed)
    else:
        raise VisarError("--real compares by prompts, and this model draws classes.")
    found = list(dict.fromkeys(found))
    if len(found) < 2:
        raise VisarError("Quality is compared over 2 or more prompts or classes, and there are not as many.")
    return found, real


def _print_quality(rows: list[QualityRow], each: int, prompts: int) -> None:
    print()
    print(table(
        ("SAMPLER", "MOVED FROM AR", "STANDARD ERROR", "FROM REAL"),
        [(r.sampler, f"{r.moved:.3f}", f"{r.error:.3f}", "" if r.real is None else f"{r.real:.3f}") for r in rows],
    ))  # fmt: skip
    print(
        f"Energy distances of EfficientNet-lite0 features, {each} pictures of each of {prompts} prompts; the first row "
        "is plain decoding under another seed."
    )
