"""The options of `visar verify`."""

from visar.cli.parsers.base import CommandParser, names, seed, whole
from visar.cli.parsers.options import json_option


def verify(p: CommandParser) -> None:
    """Test that exact samplers are exact, on models small enough to enumerate.

    visar verify --samplers scd --sequences 16384 --no-mutants
    visar verify --samplers sjd,scd --sequences 16384 --json
    """
    p.add_argument(
        "--samplers",
        type=names,
        metavar="SAMPLERS",
        help="names of `visar samplers`, separated by commas (default: all)",
    )
    p.add_argument(
        "--sequences",
        type=whole(16384, 2**28),
        default=131072,
        metavar="N",
        help="sequences per row of the table, 16384 or more",
    )
    p.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of all random numbers")
    p.add_argument("--no-mutants", action="store_true", help="leave out the known-bad samplers, which must fail")
    json_option(p, "the table")
    own = p.add_argument_group("A model of your own")
    own.add_argument(
        "--session",
        metavar="FILE.py:MAKE",
        help="test this Session: make(batch, window) returns one. The file is run, so trust it",
    )
    own.add_argument(
        "--reference",
        metavar="FILE.py:LOGITS",
        help="what to compare it with: logits(tokens [B, n]) returns [B, n + 1, V] (default: its passes of one token)",
    )
