"""Devices of a test's own, so that a mistake in what writes to them breaks none of the machine."""

from __future__ import annotations

import os
import stat
from pathlib import Path

MINOR = {"null": 3, "full": 7}


def device(path: Path, kind: str) -> Path:
    """One like /dev/null or /dev/full; for a user who may make none, a link to that, which he cannot replace either."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, MINOR[kind]))
    except PermissionError:
        path.symlink_to(f"/dev/{kind}")
    return path
