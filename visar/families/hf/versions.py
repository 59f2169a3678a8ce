"""The versions of transformers whose modules visar can decode with."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from visar.errors import VisarError

# From the first in which attention functions, and modules that build no mask for them, are as visar uses them, to the
# last that the tests ran with. `pyproject.toml` has the same bounds.
LEAST, BELOW = "5.4", "5.25"


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
