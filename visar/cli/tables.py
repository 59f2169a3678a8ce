"""`visar models` and `visar samplers`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from visar.errors import unknown
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
    from visar.samplers import DEFAULTS
    from visar.samplers.catalogue import catalogue

    rows: list[dict[str, Any]] = [
        {"name": s.name, "default": s.name == DEFAULTS[s.tokens], "exact": s.exact, "note": s.note,
         "exactness": s.exactness, "tokens": s.tokens, "drafter": s.drafter, "paper": s.paper,
         "parameters": s.parameters()}
        for s in catalogue().values()
    ]  # fmt: skip
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        print(table(
            ("NAME", "TOKENS", "EXACT?", "DRAFTER", "PAPER"),
            [
                (f"{r['name']}{' (default)' if r['default'] else ''}", r["tokens"], r["exactness"],
                 r["drafter"] or "none", r["paper"])
                for r in rows
            ],
        ))  # fmt: skip
        print("`visar samplers NAME` says what may be set of one.")
    return 0


def _parameters(options: argparse.Namespace) -> int:
    """Those of one sampler that `--set` may give."""
    from visar.samplers.catalogue import catalogue

    known = catalogue()
    if options.name not in known:
        raise unknown("sampler", options.name, known)
    spec = known[options.name]
    found = list(spec.options.values())
    if options.json:
        each = [{"name": p.name, "default": p.default, "range": p.range, "help": p.help} for p in found]
        about = {"name": spec.name, "exact": spec.exact, "note": spec.note, "paper": spec.paper}
        print(json.dumps(about | {"parameters": each}, indent=2))
        return 0
    print(f"{spec.name}: {spec.paper}; {spec.exactness}")
    if found:
        print(
            table(("PARAMETER", "DEFAULT", "RANGE", "MEANING"), [(p.name, p.default, p.range, p.help) for p in found])
        )
    return 0
