"""The options of every command, without what the commands do: nothing heavy is imported here.

A file declares the options of the module of the same name in `visar.cli`, and names the function there that runs.
"""

from __future__ import annotations

from typing import Any

from visar import __version__
from visar.cli.parsers import bench, completion, demo, evaluate, generate, sample, tables, train, verify
from visar.cli.parsers.base import CommandParser

GROUPS = {
    "Make images": ("generate", "sample", "export", "demo"),
    "Look up": ("models", "samplers"),
    "Measure": ("verify", "bench", "eval"),
    "Train": ("train",),
    "Shell": ("completion",),
}


class TopParser(CommandParser):
    """`visar` itself, whose help lists the commands in groups."""

    def format_help(self) -> str:
        commands: Any = next(a for a in self._actions if a.dest == "command")
        about = {str(a.dest): str(a.help) for a in commands._get_subactions()}
        lists = [
            "\n".join([f"{title}:", *(f"  {name:10}  {about[name]}" for name in names)])
            for title, names in GROUPS.items()
        ]
        options = "Options:\n  -h, --help  Show this help.\n  --version   Show the version.\n"
        more = "`visar COMMAND --help` shows the options of a command."
        return "\n\n".join([
            f"usage: {self.prog} COMMAND [OPTIONS]", str(self.description), *lists, f"{options}\n{self.epilog}", more
        ]) + "\n"  # fmt: skip


def parser() -> CommandParser:
    """The whole command line."""
    top = TopParser(
        prog="visar",
        description="Fast image generation with autoregressive models, and tests of which speed-ups are exact.",
        examples=('visar generate "a red heart, 3d"', "visar samplers eagle"),
    )
    top.set_defaults(run="", parser=top)
    top.add_argument("--version", action="version", version=f"visar {__version__}")
    commands = top.add_subparsers(dest="command")
    for module in (generate, sample, demo, tables, verify, bench, evaluate, train, completion):
        module.add(commands)
    return top
