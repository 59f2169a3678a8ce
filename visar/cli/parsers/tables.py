"""The options of `visar models` and `visar samplers`."""

from visar.cli.parsers.base import CommandParser
from visar.cli.parsers.options import json_option


def models(p: CommandParser) -> None:
    """List the models, or the sizes and settings of one.

    visar models
    visar models icons --concepts
    """
    p.add_argument("name", nargs="?", metavar="MODEL", help="show this one")
    p.add_argument("--concepts", action="store_true", help="list the styles and things that the model was trained on")
    json_option(p, "the table")


def samplers(p: CommandParser) -> None:
    """List the samplers, or the parameters of one.

    visar samplers
    visar samplers eagle
    """
    p.add_argument("name", nargs="?", metavar="SAMPLER", help="show the parameters of this one")
    json_option(p, "the table")


def info(p: CommandParser) -> None:
    """Say how an image file was made, and the command that makes it again.

    visar info heart.png
    visar info heart.png --json
    """
    p.add_argument("file", metavar="FILE", help="a PNG file that visar has written")
    json_option(p, "what it says")
