"""The options of every command, without what the commands do: nothing heavy is imported here."""

from __future__ import annotations

import argparse

from visar import __version__
from visar.cli.parsers.base import CommandParser, add_commands
from visar.cli.parsers.bench import bench
from visar.cli.parsers.completion import completion
from visar.cli.parsers.demo import demo
from visar.cli.parsers.evaluate import eval_
from visar.cli.parsers.generate import generate
from visar.cli.parsers.sample import export, sample
from visar.cli.parsers.serve import serve
from visar.cli.parsers.tables import info, models, samplers
from visar.cli.parsers.train import train
from visar.cli.parsers.verify import verify

GROUPS = {
    "Make images": (generate, sample, export, demo, serve),
    "Look up": (models, samplers, info),
    "Measure": (verify, bench, eval_),
    "Train": (train,),
    "Shell": (completion,),
}


class TopParser(CommandParser):
    """`visar` itself, whose help lists the commands in groups."""

    def format_help(self) -> str:
        (commands,) = (a for a in self._actions if isinstance(a, argparse._SubParsersAction))
        parts = [f"usage: {self.prog} COMMAND [OPTIONS]", str(self.description)]
        for title, group in GROUPS.items():
            names = [command.__name__.rstrip("_") for command in group]
            parts.append("\n".join([f"{title}:", *(f"  {n:10}  {commands.choices[n].description}" for n in names)]))
        parts.append("Options:\n  -h, --help  Show this help.\n  --version   Show the version.")
        parts += [str(self.epilog), "`visar COMMAND --help` shows the options of a command."]
        return "\n\n".join(parts) + "\n"


def parser() -> CommandParser:
    """The whole command line."""
    top = TopParser(
        prog="visar",
        description="Fast image generation with autoregressive models, and tests of which speed-ups are exact.",
        examples=('visar generate "a red heart, 3d"', "visar samplers eagle"),
    )
    top.add_argument("--version", action="version", version=f"visar {__version__}")
    top.set_defaults(parser=top)
    add_commands(top, *(command for group in GROUPS.values() for command in group))
    return top
