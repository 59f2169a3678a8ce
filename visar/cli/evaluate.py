"""`visar eval`: results by named protocols, and whether a sampler changed the images."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visar.cli.cluster import spread
from visar.cli.common import load_model, samplers_of
from visar.cli.output import show
from visar.cli.parsers.options import params_of, settings_of
from visar.devices import device_of
from visar.errors import VisarError
from visar.files import new_file, output_folder
from visar.tables import table

if TYPE_CHECKING:
    from visar.eval.quality.compare import Comparison, Remembering, Shift


def fid(options: argparse.Namespace) -> int:
    from visar.eval.quality.image_folder import ImageFolder
    from visar.eval.quality.measure import measure

    with ExitStack() as stack:
        found = measure(
            options.protocol, ImageFolder.open(options.folder), options.reference, device=device_of(options.device),
            batch=options.batch, seed=options.seed, weights=options.weights, extractor=spread(options, stack),
        )  # fmt: skip
    for name, reason in found.left_out.items():
        print(f"visar: note: {name} was left out: {reason}.", file=sys.stderr)
    show(options, str(found), found.to_dict())
    return 0


def clip(options: argparse.Namespace) -> int:
    from visar.eval.quality.image_folder import ImageFolder
    from visar.eval.quality.measure import measure

    images = ImageFolder.open(options.folder, captions=options.captions)
    with ExitStack() as stack:
        found = measure(
            options.protocol, images, device=device_of(options.device), batch=options.batch, weights=options.weights,
            extractor=spread(options, stack),
        )  # fmt: skip
    show(options, str(found), found.to_dict())
    return 0


def stats(options: argparse.Namespace) -> int:
    from visar.eval.quality.measure import reference_stats

    if Path(options.out).suffix != ".npz":
        raise VisarError(f"Statistics are written as .npz, not {options.out}.")
    new_file(options.out)
    with ExitStack() as stack:
        found = reference_stats(
            options.protocol, options.sources, options.out, device=device_of(options.device), batch=options.batch,
            weights=options.weights, extractor=spread(options, stack),
        )  # fmt: skip
    count = next(iter(found.moments.values())).n
    show(options, f"{options.out}: {count} images, sha256:{found.fingerprint[:12]}", found.provenance)
    return 0


def compare(options: argparse.Namespace) -> int:
    from visar.eval.quality.compare import compare as compared
    from visar.eval.quality.image_folder import ImageFolder

    a, b, *seeds = (ImageFolder.open(path) for path in (options.a, options.b, *options.seeds))
    reference = _photographs(options.reference)
    scores = _scores(options)
    found = compared(a, b, _features(options), seeds=seeds, reference=reference, clip=scores, seed=options.seed)
    show(options, _described(found), found.to_dict())
    return 0


def report(options: argparse.Namespace) -> int:
    from visar.eval.report.make import make_report
    from visar.eval.report.page import write_page
    from visar.eval.report.plots import check

    samplers = samplers_of(options)
    settings = settings_of(params_of(options))
    given = _conditions(options)
    reference, extract, scores = _photographs(options.reference), _features(options), _scores(options)
    with output_folder(options.out):
        check(Path(options.out) / "plot.svg")
        model = load_model(options, "class" if options.classes else None, samplers.values())
        model.bar = {"disable": True}
        conditions = given or _usual(model)
        found = make_report(
            model, samplers, conditions, Path(options.out), extract, name=options.model,
            count=options.num_images or len(conditions), batch=options.batch, reference=reference, clip=scores,
            speed_images=options.speed_images, progress=sys.stderr.isatty(), tell=print, **settings,
        )  # fmt: skip
        for file in write_page(found, options.out):
            print(file)
    return 0


def protocols(options: argparse.Namespace) -> int:
    from visar.eval.quality.protocols import get_protocol, protocol_names

    found = [get_protocol(name) for name in protocol_names()]
    rows = [(p.name, p.version, ", ".join(p.metrics), p.wanted, p.extractor, p.about) for p in found]
    text = table(("NAME", "VERSION", "METRICS", "IMAGES", "FEATURES", "ABOUT"), rows)
    show(options, text, [vars(p) for p in found])
    return 0


def _features(options: argparse.Namespace) -> Remembering:
    from visar.eval.quality.compare import Remembering
    from visar.eval.quality.extractors import get_extractor
    from visar.eval.quality.protocols import get_protocol

    protocol = get_protocol(options.protocol)
    return Remembering(get_extractor(protocol.extractor, device_of(options.device), options.weights), protocol.prepare)


def _scores(options: argparse.Namespace) -> Any:
    """What `--clip` asks for, or None."""
    from visar.eval.quality.compare import scores_by
    from visar.eval.quality.extractors import get_extractor
    from visar.eval.quality.protocols import get_protocol

    if options.clip is None:
        if options.clip_weights:
            raise VisarError("--clip-weights needs --clip, the protocol that they are for.")
        return None
    protocol = get_protocol(options.clip)
    return scores_by(protocol, get_extractor(protocol.extractor, device_of(options.device), options.clip_weights))


def _photographs(path: str | None) -> Any:
    from visar.eval.quality.image_folder import ImageFolder

    return None if path is None else ImageFolder.open(path, jpeg_allowed=True, mixed_allowed=True)


def _conditions(options: argparse.Namespace) -> list[Any]:
    from visar.bulk import read_classes, read_prompts

    if options.prompts and options.classes:
        raise VisarError("Give either --prompts FILE or --classes LIST.")
    if options.prompts:
        return list(read_prompts(options.prompts))
    return list(read_classes(options.classes)) if options.classes else []


def _usual(model: Any) -> list[Any]:
    """Common prompts, or all classes."""
    from visar.eval.prompts import conditions

    return conditions(model, 48 if model.family.condition == "prompt" else model.family.classes)


def _shift(name: str, s: Shift) -> str:
    return f"{name}: A {s.a:.4g}, B {s.b:.4g}, B - A {s.difference:+.3g} ({s.low:+.3g} to {s.high:+.3g}), p {s.p:.2g}"


def _described(found: Comparison) -> str:
    """The conclusion, and every number it rests on."""
    t = found.overall
    lines = [
        found.conclusion,
        f"{found.images} pairs of {found.prompts} prompts: {100 * found.same:.1f}% of the images are the same, "
        f"pixels differ by {found.levels:.2f} of 255"
        + ("" if found.tokens is None else f", {100 * found.tokens:.1f}% of the tokens are the same")
        + ".",
        f"Energy distance of {found.features} features (sha256:{found.weights[:12]}): {t.distance:.4g}, p {t.p:.2g}; "
        f"{100 * t.level:.2g}% of relabellings give {t.least:.3g} or more.",
    ]
    if (g := found.per_prompt) is not None:
        lines.append(
            f"Within a prompt: {g.distance:.4g}, p {g.p:.2g}; "
            f"{100 * g.level:.2g}% of relabellings give {g.least:.3g} or more."
        )
    lines += [f"A against another seed of its own: {s.distance:.4g}, p {s.p:.2g}." for s in found.seeds]
    if found.reference is not None:
        lines.append(_shift("Energy distance to the reference", found.reference))
    if found.clip is not None:
        lines.append(_shift("Score against the prompt", found.clip))
    return "\n".join(lines)
