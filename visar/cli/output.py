"""What a command prints, and what `--json` writes."""

from __future__ import annotations

import argparse
import json
from typing import Any

from visar.cli.parsers.base import STDOUT
from visar.files import replacing


def show(options: argparse.Namespace, text: str, data: Any) -> None:
    """Print the text, or the data where `--json` is for stdout; with a file both are given."""
    written = json.dumps(data, indent=2)
    print(written if options.json == STDOUT else text, flush=True)
    if options.json not in (None, STDOUT):
        with replacing(options.json) as temporary:
            temporary.write_text(written + "\n", encoding="utf-8")
