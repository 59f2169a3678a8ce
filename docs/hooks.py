"""What the site needs beside its pages: what lies outside of docs/, and the fields of samplers.

In the site, docs/ and the root of the repository are one folder: the model cards and NOTICE are files of it, and a link
from a page to `../assets` is one to `assets`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
SAMPLER = re.compile(r"^::: visar\.samplers\.(\w+)\n    options: .*members: false.*$", re.M)
OUTSIDE = ("assets/*/README.md", "assets/*/*.webp", "CHANGELOG.md", "SECURITY.md", "NOTICE")
LINK = re.compile(r"(\]\()([^)#\s:]+)")


def on_files(files: Files, config: Any) -> Files:
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def fields_of(name: str) -> str:
    """The names under which a sampler stands in the tables, and its fields with their ranges and what they mean."""
    from visar import samplers
    from visar.samplers.parameters import parameters_of

    kind = getattr(samplers, name)
    tables = samplers.SAMPLERS
    names = ", ".join(f"`{spec.name}`" for spec in tables.values() if type(spec.make()) is kind)
    rows = [f"| `{p.name}` | `{p.default}` | {p.range} | {p.help} |" for p in parameters_of(kind()).values()]
    table = ["", "| field | default | allowed | meaning |", "|---|---|---|---|", *rows] if rows else []
    return "\n".join([f"In the tables as {names}.", *table])


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    source = Path(page.file.abs_src_path)
    depth = len(Path(page.file.src_uri).parent.parts)

    def inside(match: re.Match[str]) -> str:
        path = (source.parent / match[2]).resolve()
        home = ROOT / "docs" if path.is_relative_to(ROOT / "docs") else ROOT
        if not path.exists() or not path.is_relative_to(ROOT):
            return match[0]
        return match[1] + "../" * depth + path.relative_to(home).as_posix()

    if page.file.src_uri == "report/report.md":
        page.meta["hide"] = ["toc"]  # its table needs the room
    markdown = SAMPLER.sub(lambda match: f"{match[0]}\n\n{fields_of(match[1])}", markdown)
    return LINK.sub(inside, markdown)
