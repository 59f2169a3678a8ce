"""The versions of transformers whose modules visar can decode with."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from visar.errors import VisarError

# The first and the last that `tests/families/hf/test_sessions.py` ran with. `pyproject.toml` has the same bounds.
LEAST, BELOW = "5.0", "5.25"


def check_version() -> None:
    """Raise `VisarError` for a version of transformers outside of the range. Imports nothing of it."""
    if (found := installed()) is None:
        raise VisarError(f"This model needs transformers, from version {LEAST} to below {BELOW}: pip install it.")
    if not Version(LEAST) <= Version(Version(found).base_version) < Version(BELOW):
        raise VisarError(
            f"This model runs by transformers' own code, from version {LEAST} to below {BELOW}; {found} is installed."
        )


@functools.cache
def installed() -> str | None:
    """The version of transformers, None if there is none."""
    try:
        return version("transformers")
    except PackageNotFoundError:
        return None
