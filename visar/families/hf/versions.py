"""The versions of transformers whose modules visar can decode with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from visar.errors import VisarError

# From the first in which attention functions, and modules that build no mask for them, are as visar uses them, to the
# last that the tests ran with. `pyproject.toml` has the same bounds.
LEAST, BELOW = "5.0", "5.25"


def check_version() -> None:
    """Raise `VisarError` for a version of transformers outside of the range. Imports nothing of it."""
    try:
        found = version("transformers")
    except PackageNotFoundError as error:
        raise VisarError(f"This model needs transformers, from {LEAST} to below {BELOW}: pip install it.") from error
    if not Version(LEAST) <= Version(Version(found).base_version) < Version(BELOW):
        raise VisarError(
            f"This model runs by transformers' own code, from version {LEAST} to below {BELOW}; {found} is installed."
        )
