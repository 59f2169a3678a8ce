"""The options of `visar models` and `visar samplers`."""

from visar.cli.parsers.base import Commands, add_command
from visar.cli.parsers.options import json_option


def add(commands: Commands) -> None:
    p = add_command(
        commands, "models", "tables:models", "List the models, or the sizes and settings of one.",
        "visar models",
        "visar models icons --json",
    )  # fmt: skip
    p.add_argument("name", nargs="?", metavar="MODEL", help="show this one")
    json_option(p, "the table")

    p = add_command(
        commands, "samplers", "tables:samplers", "List the samplers, or the parameters of one.",
        "visar samplers",
        "visar samplers eagle",
    )  # fmt: skip
    p.add_argument("name", nargs="?", metavar="SAMPLER", help="show the parameters of this one")
    json_option(p, "the table")
