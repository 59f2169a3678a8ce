"""The `visar` command. Parsing imports nothing heavy; each command imports what it needs when it runs."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress

from visar.cli.parsers import parser
from visar.cli.parsers.base import STDOUT, UsageError
from visar.errors import VisarError, of_the_machine, short
from visar.files import check_output, tidy
from visar.user_code import blamed

__all__ = ["main", "parser"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 (a check failed), 2 (bad input), or 130 (interrupted)."""
    arguments = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):  # None where it is closed, or a test's own
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    warnings.showwarning = lambda message, *_, **__: _tell(f"note: {short(str(message))}")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        return _run(arguments)
    except UsageError as error:
        _tell(f"error: {error}", error.usage)
    except VisarError as error:
        _tell(f"error: {error}")
    except BrokenPipeError:
        _forget_stdout()
        return 0
    except KeyboardInterrupt:
        _tell("interrupted")
        return 130
    except Exception as error:
        if (sentence := of_the_machine(error)) is None:
            raise
        _tell(f"error: {sentence}")
        if isinstance(error, OSError):
            _forget_stdout()  # it may be what failed
    return 2


def _run(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    run, command = options.__dict__.pop("run"), options.__dict__.pop("parser")
    if not run:
        command.print_help(sys.stderr)
        return 2
    module, _, function = run.partition(":")
    with tidy(), blamed():
        if getattr(options, "json", None) not in (None, STDOUT):
            check_output(options.json)  # before minutes of work
        code: int = getattr(importlib.import_module(f"visar.cli.{module}"), function)(options)
    if sys.stdout is not None:
        sys.stdout.flush()  # so that a closed pipe or a full disk shows here
    return code


def _tell(text: str, before: str = "") -> None:
    with suppress(OSError):  # nobody may be listening
        print(f"{before}visar: {text}", file=sys.stderr, flush=True)


def _forget_stdout() -> None:
    """Let what is still buffered go nowhere when the process ends, where stdout takes no more."""
    with suppress(AttributeError, ValueError, OSError):
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
