"""`visar models` and `visar samplers`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from visar.cli.output import show
from visar.tables import table

FLOOR = (
    "FLOOR MS is the time in which an H100 reads what a token of one image in bfloat16 takes: weights, and the cache "
    "halfway through the image."
)


def models(options: argparse.Namespace) -> int:
    if options.concepts:
        return _concepts(options)
    rows = model_rows()
    if options.name is not None:
        row = _named("model", options.name, rows) | _inside(options.name)
        told = [(name.replace("_", " "), _told(value)) for name, value in _readable(row).items() if value]
        show(options, table(told[0], told[1:]), row)
        return 0
    columns = ("name", "condition", "pixels", "parameters", "floor_ms", "licence", "weights")
    lines = [[_told(value) for name, value in _readable(row).items() if name in columns] for row in rows]
    text = table([column.upper().replace("_", " ") for column in columns], lines)
    show(options, f"{text}\n{FLOOR}", rows)
    return 0


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    """A listing with numbers that are easy to read, in the order of the table's columns."""
    count, floor = row["parameters"], row["floor_ms"]
    numbers = {
        "parameters": f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M",
        "floor_ms": "-" if floor is None else f"{floor:.2f}",
        "licence": row["licence"],
        "weights": row["weights"],
    }
    return {name: value for name, value in row.items() if name not in numbers} | numbers


def _concepts(options: argparse.Namespace) -> int:
    from visar.errors import VisarError
    from visar.text_encoders.concepts import concepts

    if options.name is None:
        raise VisarError("--concepts is about one model: give its name, as in `visar models icons --concepts`.")
    found = concepts(options.name)
    lines = [
        ("styles", _told(found.styles)),
        *((group or "things", _told(names)) for group, names in found.groups.items()),
    ]
    show(
        options,
        "\n".join(f"{name}: {known}" for name, known in lines),
        {"styles": found.styles, "groups": found.groups},
    )
    return 0


def model_rows() -> list[dict[str, Any]]:
    """The table of models."""
    from visar.families.catalogue import catalogue

    return [asdict(listing) for listing in catalogue().values()]


def _inside(name: str) -> dict[str, Any]:
    """The default settings, components and drafters of an embedded model."""
    from visar.families.catalogue import embedded_folder, is_embedded
    from visar.families.source import open_source

    if not is_embedded(name):
        return {}
    index = open_source(name).index
    parts = [key for key, value in index.items() if isinstance(value, list)]
    settings = {k: v for k, v in index.items() if k not in parts and not k.startswith("_") and v is not None}
    others = sorted(folder.name for folder in embedded_folder(name).iterdir() if folder.is_dir())
    return {"settings": settings, "components": parts, "drafters": [part for part in others if part not in parts]}


def samplers(options: argparse.Namespace) -> int:
    rows = sampler_rows()
    if options.name is not None:
        return _parameters(options, _named("sampler", options.name, rows))
    lines = [
        (f"{r['name']}{' (default)' if r['default'] else ''}", r["tokens"], "yes" if r["exact"] else "no",
         r["drafter"] or "none", "; ".join(filter(None, (r["paper"], r["note"]))))
        for r in rows
    ]  # fmt: skip
    text = table(("NAME", "TOKENS", "EXACT", "DRAFTER", "PAPER"), lines)
    show(options, f"{text}\n`visar samplers NAME` shows the parameters of one.", rows)
    return 0


def sampler_rows() -> list[dict[str, Any]]:
    """The table of samplers, read without importing torch."""
    from visar.samplers import DEFAULTS
    from visar.samplers.catalogue import catalogue

    return [
        {"name": s.name, "default": s.name == DEFAULTS[s.tokens], "exact": s.exact, "note": s.note or None,
         "tokens": s.tokens, "drafter": s.drafter, "paper": s.paper, "parameters": s.parameters()}
        for s in catalogue().values()
    ]  # fmt: skip


def info(options: argparse.Namespace) -> int:
    """`visar info`: what a file says of its making, and the command that repeats it."""
    from visar.recipe import Recipe, printable

    recipe = Recipe.read(options.file)
    last = recipe.image and not recipe.grid
    more = f"\nIt is the last of the {recipe.image + 1} images of this command." if last else ""
    note = recipe.note()
    settings = [(name.replace("_", " "), str(value)) for name, value in recipe.settings.items()]
    kind = "prompt" if recipe.prompt is not None else "class"
    rows = [
        *((kind, str(condition)) for condition in recipe.conditions), ("model", recipe.model),
        ("sampler", f"{recipe.sampler} ({recipe.exactness})"), *settings,
        *((name, str(value)) for name, value in recipe.parameters.items()), ("dtype", recipe.dtype),
        *([("grid", f"{recipe.count} images")] if recipe.grid else []),
        *([("scale", str(recipe.scale))] if recipe.scale > 1 else []),
    ]  # fmt: skip
    text = table(("FILE", printable(str(options.file))), [(name, printable(value)) for name, value in rows])
    show(
        options,
        "\n".join(filter(None, (f"{text}\n{recipe.command()}{more}", note))),
        recipe.model_dump(exclude_none=True) | {"command": recipe.command(), "note": note or None},
    )
    return 0


def _parameters(options: argparse.Namespace, row: dict[str, Any]) -> int:
    """Those of one sampler that `--set` may give."""
    from visar.samplers.catalogue import catalogue

    found = catalogue()[row["name"]].options.values()
    each = [{"name": p.name, "default": p.default, "range": p.range, "help": p.help} for p in found]
    text = f"{row['name']}: {row['paper']}; {row['note'] or ('exact' if row['exact'] else 'relaxed')}"
    if found:
        lines = [(p.name, p.default, p.range, p.help) for p in found]
        text += "\n" + table(("PARAMETER", "DEFAULT", "RANGE", "MEANING"), lines)
    show(options, text, {**row, "parameters": each})
    return 0


def _named(kind: str, name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    from visar.errors import unknown

    for row in rows:
        if row["name"] == name:
            return row
    raise unknown(kind, name, [row["name"] for row in rows])


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
