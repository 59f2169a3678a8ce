"""`visar verify`: tests of exactness as a table; exit code 1 if a row fails."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from math import isfinite
from typing import TYPE_CHECKING, Any

from visar.cli.common import give_drafters
from visar.cli.output import show
from visar.cli.parsers.base import STDOUT
from visar.errors import VisarError

if TYPE_CHECKING:
    from visar.eval.exactness.joint import Row
    from visar.eval.exactness.own_model import Check

IMAGES = 4  # a row of continuous tokens needs fewer images than sequences, by this factor


def verify(options: argparse.Namespace) -> int:
    from visar.eval.exactness.continuous import verify_continuous
    from visar.eval.exactness.joint import EXACT_LIMIT, MUTANT_LIMIT
    from visar.eval.exactness.joint import verify as prove
    from visar.samplers import DEFAULTS, get_sampler

    names = None if options.samplers in (None, [], ["all"]) else options.samplers
    if options.no_mutants and (options.model or options.session) is not None:
        raise VisarError("--no-mutants leaves known-bad samplers out, and with --model and --session there are none.")
    if options.model is not None:
        return verify_on(options, names)
    own = (options.prompt, options.label, options.image_size, options.drafter or None)
    if own != (None,) * 4 or options.device != "auto":
        raise VisarError("--prompt, --class, --image-size, --drafter and --device go with --model; give it too.")
    kinds = {name: getattr(get_sampler(name), "tokens", "discrete") for name in names or ()}
    if options.session is not None:
        return verify_own(options, names)
    if options.reference is not None:
        raise VisarError("--reference is what a --session is compared with; give both.")

    def line(row: Row) -> None:
        if options.json != STDOUT:
            print(_line(row), flush=True)

    if options.json != STDOUT:
        print(_heads("SAMPLER"))
    discrete, continuous = ([name for name, kind in kinds.items() if kind == k] for k in DEFAULTS)
    rows, mutants = [], not options.no_mutants
    if discrete or not names:
        rows += prove(discrete or None, options.sequences, options.seed, mutants, report=line)
    if continuous or not names:
        rows += verify_continuous(continuous or None, options.sequences // IMAGES, options.seed, mutants, report=line)
    good = all(row.passed for row in rows)
    tests = [
        *(["Joint distribution over all sequences, chi-square z."] if discrete or not names else []),
        *(["Joint distribution of continuous tokens, z of the whitened images."] if continuous or not names else []),
    ]
    text = (
        f"{' '.join(tests)} Exact: |z| < {EXACT_LIMIT:g}, and the same tokens in batches of 1, 8 and all"
        f"{', continuous ones up to rounding' if continuous or not names else ''}. "
        f"Known-bad samplers: |z| > {MUTANT_LIMIT:g}. {_result(good)}"
    )
    show(options, text, [_said(row) for row in rows])
    return 0 if good else 1


def verify_on(options: argparse.Namespace, names: list[str] | None) -> int:
    """The table of the samplers of a loaded model; exit code 1 if a row fails."""
    import torch

    from visar.devices import device_of
    from visar.eval.exactness.joint import EXACT_LIMIT
    from visar.eval.exactness.on_model import verify_model
    from visar.generation.model import ImageModel

    if options.session is not None or options.reference is not None:
        raise VisarError("Give either --model or --session.")
    model = ImageModel.load(options.model, image_size=options.image_size).to(
        device_of(options.device), torch.float32
    )  # passes of any width agree
    model.bar = {"disable": True}
    give_drafters(model, options.drafter, names)
    text, label = options.prompt, options.label
    if (label is not None and text is not None) or (label if model.family.condition == "prompt" else text) is not None:
        raise VisarError(f"{options.model} is called with a {model.family.condition}; give that only.")
    condition = text or "a red heart" if model.family.condition == "prompt" else label or 0

    shown: list[Row] = []

    def line(row: Row) -> None:
        if options.json != STDOUT:
            print(_line(row) if shown else f"{_heads('SAMPLER')}\n{_line(row)}", flush=True)
        shown.append(row)

    rows = verify_model(model, condition, names, options.sequences, options.seed, line)
    good = all(row.passed for row in rows)
    text = (
        f"Rosenblatt's test of all tokens given those before them, on {options.model}. Exact: |z| < {EXACT_LIMIT:g}, "
        f"and the same tokens alone. {_result(good)}"
    )
    show(options, text, [_said(row) for row in rows])
    return 0 if good else 1


def verify_own(options: argparse.Namespace, names: list[str] | None) -> int:
    """The table of a session of your own; exit code 1 if a check or a row fails."""
    from visar.eval.exactness.joint import EXACT_LIMIT, Row
    from visar.eval.exactness.own_model import verify_files

    def line(found: Check | Row) -> None:
        if options.json == STDOUT:
            return
        if isinstance(found, Row):
            print(_line(found), flush=True)
        else:
            print(_cells(found.check, "", "", "", "good" if found.passed else "FAILED"), flush=True)

    if options.json != STDOUT:
        print(_heads("CHECK OR SAMPLER"))
    checks, rows = verify_files(
        options.session, options.reference, names=names, sequences=options.sequences, seed=options.seed, report=line
    )
    good = all(c.passed for c in checks) and all(r.passed for r in rows)
    unseen = "" if options.reference else " Only --reference finds a mistake in those."
    source = "the reference" if options.reference else "the session's own passes of one token"
    text = checks[-1].message or (
        f"Joint distribution over all sequences against {source}, chi-square z.{unseen} Exact: |z| < {EXACT_LIMIT:g}, "
        f"and the same tokens in batches of 1, 8 and all. {_result(good)}"
    )
    told = {"checks": [_said(c) for c in checks], "rows": [_said(r) for r in rows], "reference": options.reference}
    show(options, text, told)
    return 0 if good else 1


def _result(good: bool) -> str:
    return "All rows pass." if good else "SOME ROWS FAIL."


def _cells(first: str, case: str, z: str, tokens_per_pass: str, result: str) -> str:
    """A line of the table, whose rows are printed as they come."""
    return f"{first:26}  {case:22}  {z:>8}  {tokens_per_pass:>11}  {result}"


def _heads(first: str) -> str:
    return _cells(first, "CASE", "z", "TOKENS/PASS", "RESULT")


def _line(row: Row) -> str:
    good = {"exact": "exact", "mutant": "caught", "relaxed": f"relaxed, {row.distance or 0:.2f} nats"}[row.kind]
    result = good if row.passed else "FAILED"
    return _cells(row.sampler, row.case, f"{row.z:.1f}", f"{row.tokens_per_pass:.2f}", result)


def _said(found: Check | Row) -> dict[str, Any]:
    """What JSON has of a check or a row; it has no infinity."""
    return {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in asdict(found).items()} | {
        "passed": found.passed
    }
