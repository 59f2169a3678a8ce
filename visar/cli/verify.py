"""`visar verify`: the exactness proof as a table; exit code 1 if a row fails."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from math import isfinite

from visar.errors import VisarError


def verify(options: argparse.Namespace) -> int:
    from visar.eval.exactness import EXACT_LIMIT, MUTANT_LIMIT, Row
    from visar.eval.exactness import verify as prove

    if options.sequences < 16384:
        raise VisarError(f"--sequences must be 16384 or more for the test to mean something, not {options.sequences}.")

    def line(row: Row) -> None:
        if not options.json:
            verdict = ("caught" if row.kind == "mutant" else "exact") if row.passed else "FAILED"
            print(f"{row.sampler:26}  {row.case:22}  {row.z:8.1f}  {row.tokens_per_pass:11.2f}  {verdict}", flush=True)

    if not options.json:
        print(f"{'SAMPLER':26}  {'CASE':22}  {'z':>8}  TOKENS/PASS  VERDICT")
    names = None if options.sampler == ["all"] else options.sampler
    rows = prove(names, options.sequences, options.seed, not options.no_mutants, report=line)
    good = all(row.passed for row in rows)
    if options.json:
        print(
            json.dumps([asdict(r) | {"z": r.z if isfinite(r.z) else None, "passed": r.passed} for r in rows], indent=2)
        )
    else:
        print(
            f"Joint law over all sequences, chi-square z. Exact: |z| < {EXACT_LIMIT:g}, and the same tokens in batches "
            f"of 1, 8 and all. Planted mistakes: |z| > {MUTANT_LIMIT:g}. "
            f"{'All rows pass.' if good else 'SOME ROWS FAIL.'}"
        )
    return 0 if good else 1
