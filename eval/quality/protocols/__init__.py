"""Named protocols of image evaluation: small versioned files, so that a result says exactly how it was measured.

A file is never edited in a way that changes its results without a new version.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from typing import Any

from visar.errors import VisarError, unknown

KINDS = ("frechet", "inception_score", "precision", "recall", "kid", "cmmd", "clip_score")
COMPARING = {"frechet", "precision", "recall", "kid", "cmmd"}  # these need a reference


@dataclass(frozen=True)
class Protocol:
    """How metrics of that name are measured.

    `extractor` is a name of `get_extractor`, `prepare` of `visar.eval.quality.extractors.resize.PREPARE`. `pixels`: the
    side that images must have, or None. `formats` of the files. `wanted` images is what papers use; under `least` is an
    error, under `warn_below` a warning. `metrics`: the name to print, and its kind with what it needs. `reference`: in
    words, or None where there is none. `rules`: what the files themselves do not show. `used_by`: papers, arXiv ids.
    """

    name: str
    version: int
    about: str
    extractor: str
    prepare: str
    pixels: int | None
    formats: tuple[str, ...]
    wanted: int
    least: int
    warn_below: int
    metrics: dict[str, dict[str, Any]]
    reference: str | None
    rules: tuple[str, ...]
    used_by: tuple[dict[str, str], ...]

    @property
    def label(self) -> str:
        """Name and version, as results carry it."""
        return f"{self.name}@{self.version}"


def protocol_names() -> list[str]:
    """Every protocol there is, sorted."""
    return sorted(f.name.removesuffix(".json") for f in files(__name__).iterdir() if f.name.endswith(".json"))


@cache
def get_protocol(name: str) -> Protocol:
    """The protocol of that name, or of name@version; another version than the one here is an error."""
    plain, _, version = name.partition("@")
    if plain not in protocol_names():
        raise unknown("protocol", plain, protocol_names())
    body = json.loads(files(__name__).joinpath(f"{plain}.json").read_text(encoding="utf-8"))
    found = parse_protocol(body)
    if version and version != str(found.version):
        raise VisarError(f"Protocol {plain!r} is at version {found.version} here, not {version}.")
    return found


def parse_protocol(body: dict[str, Any]) -> Protocol:
    """The protocol of a file's content, which must have every field and no other."""
    wanted = {f.name for f in fields(Protocol)}
    if wrong := sorted(wanted ^ set(body)):
        raise VisarError(f"A protocol must have the fields {', '.join(sorted(wanted))}; {wrong[0]!r} is amiss.")
    for metric, about in body["metrics"].items():
        if about.get("kind") not in KINDS:
            raise unknown("kind of metric", str(about.get("kind")), KINDS)
        if about["kind"] in COMPARING and body["reference"] is None:
            raise VisarError(f"Metric {metric!r} of protocol {body['name']!r} needs a reference.")
    content: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in body.items()}
    return Protocol(**content)
