"""The `visar` command. Parsing imports nothing heavy; each command imports what it needs when it runs."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from visar.cli.parsers import parser
from visar.cli.parsers.base import STDOUT, UsageError
from visar.errors import VisarError, of_the_machine, short
from visar.files import check_output, tidy
from visar.user_code import blamed

__all__ = ["main", "parser"]

RUN = "run.json"  # of `visar.bulk.folder`


class Terminated(KeyboardInterrupt):
    """SIGTERM has come."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 (a check failed), 2 (bad input), 130 (interrupted) or 143 (terminated)."""
    arguments = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):  # None where it is closed, or a test's own
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    warnings.showwarning = lambda message, *_, **__: _tell(f"note: {short(str(message))}")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with _ended_as_interrupted():
            return _run(arguments)
    except UsageError as error:
        _tell(f"error: {error}", error.usage)
    except VisarError as error:
        _tell(f"error: {error}")
    except BrokenPipeError:
        _forget_stdout()
        return 0
    except Terminated:
        _tell("terminated")
        return 143
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
            _check_json(options)
            check_output(options.json)  # before minutes of work
        code: int = getattr(importlib.import_module(f"visar.cli.{module}"), function)(options)
    if sys.stdout is not None:
        sys.stdout.flush()  # so that a closed pipe or a full disk shows here
    return code


def _check_json(options: argparse.Namespace) -> None:
    """Raise `VisarError` for a --json that would replace what another option reads or writes, or what a run needs."""
    target = os.path.realpath(options.json)
    if os.path.basename(target) == RUN:
        raise VisarError(f"--json would replace {RUN}, which describes a run of `visar sample`; give another name.")
    for name, value in vars(options).items():
        for one in value if isinstance(value, list) else [value]:
            if name != "json" and isinstance(one, str) and os.path.realpath(one) == target:
                raise VisarError(f"--json would replace {one}, which is given for something else; give another name.")


@contextmanager
def _ended_as_interrupted() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that it removes what is half written.

    Processes of torchrun die at once, as one that waits for the others hears no signal.
    """

    def end(*_: object) -> None:
        raise Terminated

    try:
        before = None if "RANK" in os.environ else signal.getsignal(signal.SIGTERM)
        if before is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, end)
    except ValueError:  # a thread that is not the main one
        before = None
    try:
        yield
    finally:
        if before is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, before)


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
