"""The `visar` command. Parsing imports nothing heavy; each subcommand imports what it needs when it runs."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from visar import __version__
from visar.cli import arguments, evaluate_arguments, train_arguments
from visar.errors import VisarError
from visar.user_code import blamed


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="visar", description="Fast, provably exact decoding of image autoregressive models."
    )
    top.add_argument("--version", action="version", version=f"visar {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        arguments.generate, arguments.demo, arguments.sample, arguments.export, arguments.models, arguments.samplers,
        arguments.verify, arguments.bench, evaluate_arguments.evaluate, train_arguments.train,
    ):  # fmt: skip
        add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 (a check failed), 2 (bad input), or 130 (interrupted)."""
    options = parser().parse_args(argv)
    warnings.showwarning = lambda message, *_, **__: print(f"visar: note: {message}", file=sys.stderr)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with blamed():
            code = options.run(options)
        sys.stdout.flush()  # so that a closed pipe shows here
        return code
    except VisarError as error:
        print(f"visar: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("visar: interrupted", file=sys.stderr)
        return 130
