"""The error a user can cause: one clear sentence, and exit code 2 on the command line; and a warning."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VisarError(ValueError):
    """Bad input. The message says what was wrong and what is allowed."""


class NotInTraining(UserWarning):
    """A prompt asks for what the model was not trained on."""


def unknown(kind: str, name: str, known: Iterable[str]) -> VisarError:
    """The error for a name that is not in a table, with the closest name that is."""
    names = sorted(known)
    lower = {n.lower(): n for n in names}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    hint = f" Did you mean {lower[close[0]]!r}?" if close else ""
    return VisarError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")
