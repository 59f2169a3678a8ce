"""What a command prints, and what `--json` writes."""

from __future__ import annotations

import argparse
import json
from typing import Any

from visar.cli.parsers.base import STDOUT
from visar.files import check_output, replacing


def check_json(options: argparse.Namespace) -> None:
    """Raise `VisarError` where the file of `--json` cannot be written; to be called before minutes of work."""
    if options.json not in (None, STDOUT):
        check_output(options.json)


def show(options: argparse.Namespace, text: str, data: Any) -> None:
    """Print the text, or the data where `--json` is for stdout; with a file both are given."""
    written = json.dumps(data, indent=2)
    print(written if options.json == STDOUT else text, flush=True)
    if options.json not in (None, STDOUT):
        with replacing(options.json) as temporary:
            temporary.write_text(written + "\n", encoding="utf-8")
