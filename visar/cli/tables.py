"""`visar models` and `visar samplers`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from visar.tables import table


def models(options: argparse.Namespace) -> int:
    from visar.families.catalogue import catalogue

    rows = [
        {"name": m.name, "condition": m.condition, "pixels": list(m.pixels), "weights": m.weights, "title": m.title}
        for m in catalogue().values()
    ]
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        print(table(
            ("NAME", "CONDITION", "PIXELS", "WEIGHTS"),
            [(r["name"], r["condition"], "/".join(map(str, r["pixels"])), r["weights"]) for r in rows],
        ))  # fmt: skip
    return 0


def samplers(options: argparse.Namespace) -> int:
    if options.name is not None:
        return _parameters(options)
    from visar.samplers import CONTINUOUS, DEFAULT_CONTINUOUS, DEFAULT_SAMPLER, SAMPLERS

    rows: list[dict[str, Any]] = [
        {"name": s.name, "default": s.name in (DEFAULT_SAMPLER, DEFAULT_CONTINUOUS), "law": s.law,
         "tokens": "continuous" if s.name in CONTINUOUS else "discrete", "drafter": s.drafter or None,
         "paper": s.paper, "parameters": s.parameters()}
        for s in (*SAMPLERS.values(), *CONTINUOUS.values())
    ]  # fmt: skip
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        print(table(
            ("NAME", "TOKENS", "LAW", "DRAFTER", "PAPER"),
            [
                (f"{r['name']}{' (default)' if r['default'] else ''}", r["tokens"], r["law"], r["drafter"] or "none",
                 r["paper"])
                for r in rows
            ],
        ))  # fmt: skip
        print("`visar samplers NAME` says what may be set of one.")
    return 0


def _parameters(options: argparse.Namespace) -> int:
    """Those of one sampler that `--set` may give."""
    from visar.samplers import spec_of
    from visar.samplers.parameters import parameters_of

    spec = spec_of(options.name)
    found = [p for p in parameters_of(spec.make()).values() if not p.fixed]
    if options.json:
        each = [{"name": p.name, "default": p.default, "range": p.range, "help": p.help} for p in found]
        print(json.dumps({"name": spec.name, "law": spec.law, "paper": spec.paper, "parameters": each}, indent=2))
        return 0
    print(f"{spec.name}: {spec.paper}; {spec.law}")
    if found:
        print(
            table(("PARAMETER", "DEFAULT", "RANGE", "MEANING"), [(p.name, p.default, p.range, p.help) for p in found])
        )
    return 0
