"""The words of a prompt as people type it, and simpler forms of a word."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

ENDINGS = (
    ("ies", "y"), ("es", ""), ("s", ""), ("ing", ""), ("ing", "e"), ("ied", "y"), ("ed", ""), ("ed", "e"), ("ly", ""),
)  # fmt: skip
SILENT = frozenset(["a", "an", "the", "of", "and", "with", "in", "on", "some"])
# What people put before the thing itself: "a photo of", "draw me".
OPENING = re.compile(
    r"^(please )?((draw|show|make|give|paint|generate)( me)? (?=an? |the |some ))?((an? |the )?([a-z]+ )?"
    r"(photo|photograph|picture|image|drawing|icon|emoji|illustration|painting|sketch|rendering|clip ?art) of )?"
)


def words_of(text: str) -> list[str]:
    """Lower-case words of a text without accents; articles and the like, and "a photo of", are left out."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower().strip()
    plain = plain[OPENING.match(plain).end() :] or plain  # type: ignore[union-attr]  # it matches any text
    return [w for w in re.findall(r"[a-z0-9]+", plain.replace("'", "")) if w not in SILENT]


def stems(word: str) -> Iterable[str]:
    """The word, then simpler forms of it to look for."""
    yield word
    for ending, replacement in ENDINGS:
        if word.endswith(ending) and len(word) > len(ending) + 2:
            yield word[: -len(ending)] + replacement
