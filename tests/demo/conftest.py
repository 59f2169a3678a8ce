"""A demo over HTTP, and somebody who visits it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.web import Visitor, serving


@pytest.fixture(scope="module")
def served(text_folder: Path) -> Iterator[str]:
    with serving(text_folder, "--allowed-host", "Demo.example.org", "--trusted-proxy", "127.0.0.9") as address:
        yield address


@pytest.fixture
def visitor(served: str) -> Visitor:
    return Visitor(served, "visitor")
