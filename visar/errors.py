"""The error a user can cause: one clear sentence, and exit code 2 on the command line; and a warning."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable

LONGEST = 1000  # characters of a message


class VisarError(ValueError):
    """Bad input. The message says what was wrong and what is allowed, on one line."""

    def __init__(self, message: object = "") -> None:
        super().__init__(short(str(message)))


class NoDistribution(VisarError):
    """What was computed from a model's logits is no distribution: its weights or the settings are to blame."""


class NotInTraining(UserWarning):
    """A prompt asks for what the model was not trained on."""


def short(text: str, most: int = LONGEST) -> str:
    """The text on one line, with its middle left out where it is too long: a prompt of a megabyte may be in it."""
    if len(text) > most:
        text = f"{text[: most // 2]} ... ({len(text) - most} characters) ... {text[-(most - most // 2) :]}"
    return " ".join(text.splitlines())


def of_the_machine(error: BaseException) -> str | None:
    """The sentence for a disk, memory or encoding that failed; None for an error that is a mistake in visar."""
    text = str(error)
    named = type(error).__name__
    if isinstance(error, MemoryError) or named == "OutOfMemoryError" or "allocate memory" in text:
        return "Memory ran out. Fewer images at once (-n, --batch), a smaller size or a smaller model need less."
    if isinstance(error, OSError):
        why = (error.strerror or text or named).rstrip(".")
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
        return short(f"{name}: {why}." if name else f"{why}.")
    if isinstance(error, UnicodeEncodeError):
        return f"This text cannot be written in {error.encoding}, the encoding of your locale: set PYTHONUTF8=1."
    if isinstance(error, ModuleNotFoundError) and (name := error.name or "") and not name.startswith("visar"):
        return f"The package {name.partition('.')[0]} is not installed, which visar or one of its extras needs."
    return None


def unknown(kind: str, name: object, known: Iterable[str]) -> VisarError:
    """The error for a name that is not in a table, with the closest name that is."""
    names, text = sorted(known), str(name)
    lower = {n.lower(): n for n in names}
    close = difflib.get_close_matches(text.lower()[:200], lower, n=1)
    hint = f" Did you mean {lower[close[0]]!r}?" if close else ""
    return VisarError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")
