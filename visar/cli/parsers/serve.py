"""The options of `visar serve`."""

import argparse

from visar.cli.parsers.base import CommandParser, positive, whole
from visar.cli.parsers.options import model_options, sampler_options


def least_and_most(text: str) -> tuple[int, int]:
    """The type of an option for a number, or two of which the first is not larger."""
    least, _, most = text.partition("-")
    if not (least.isdecimal() and (most or least).isdecimal() and 1 <= int(least) <= int(most or least) <= 4096):
        raise argparse.ArgumentTypeError(f"must be a number from 1, or two such as 1-8, not {text!r}")
    return int(least), int(most or least)


def serve(p: CommandParser) -> None:
    """Serve images over HTTP, by OpenAI's images API.

    visar serve
    visar serve --model icons --sampler scd --sampler ar --rows 16 --api-key-file keys.txt
    """
    model_options(p, several="icons")
    sampler_options(p, repeatable="scd, or mar-headspec for continuous tokens")
    p.add_argument_group("Sampler").add_argument(
        "--invariant", action="store_true", default=None,
        help="passes of any width and batch give the same bits, which takes more time",
    )  # fmt: skip
    server = p.add_argument_group("Server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    server.add_argument("--port", type=whole(), default=8000, metavar="N", help="0 for any that is free")
    server.add_argument(
        "--api-key-file", metavar="FILE", help="API keys, one a line (default: that of VISAR_API_KEY, or none)"
    )
    server.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME", help="a name by which others reach it"
    )
    machines = p.add_argument_group("Many machines")
    machines.add_argument("--ray", action="store_true", help="serve with Ray: one front, and an engine for each GPU")
    machines.add_argument(
        "--replicas", type=least_and_most, metavar="N|N-M", help="engines; N-M follows the load (default: 1)"
    )
    machines.add_argument(
        "--ray-address", metavar="ADDRESS", help='"auto", or host:port (default: a cluster of this machine alone)'
    )
    limits = p.add_argument_group("Limits")
    limits.add_argument("--rows", type=whole(1, 4096), default=8, metavar="N", help="images at once of a sampler")
    limits.add_argument("--waiting", type=whole(0), default=64, metavar="N", help="images in line, at most")
    limits.add_argument(
        "--max-images", type=whole(1), metavar="N",
        help="images in a request, at most (default: 10, or what --rows and --waiting have room for)",
    )  # fmt: skip
    limits.add_argument("--deadline", type=positive, default=600, metavar="S", help="seconds of a request, at most")
    limits.add_argument(
        "--drain", type=positive, default=30, metavar="S", help="seconds in which images are finished at the end"
    )
