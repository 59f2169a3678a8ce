"""The `visar` command. Parsing imports nothing heavy; each command imports what it needs when it runs."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence

from visar.cli.parsers import parser
from visar.cli.parsers.base import UsageError
from visar.errors import VisarError
from visar.user_code import blamed

__all__ = ["main", "parser"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 (a check failed), 2 (bad input), or 130 (interrupted)."""
    arguments = sys.argv[1:] if argv is None else argv
    warnings.showwarning = lambda message, *_, **__: print(f"visar: note: {message}", file=sys.stderr)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        options = parser().parse_args(arguments)
        run, command = options.__dict__.pop("run"), options.__dict__.pop("parser")
        if not run:
            command.print_help(sys.stderr)
            return 2
        module, _, function = run.partition(":")
        with blamed():
            code: int = getattr(importlib.import_module(f"visar.cli.{module}"), function)(options)
        sys.stdout.flush()  # so that a closed pipe shows here
        return code
    except UsageError as error:
        print(f"{error.usage}visar: error: {error}", file=sys.stderr)
        return 2
    except VisarError as error:
        print(f"visar: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("visar: interrupted", file=sys.stderr)
        return 130
