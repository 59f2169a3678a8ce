"""The options of `visar verify`."""

from visar.cli.parsers.base import CommandParser, names, seed, size, whole
from visar.cli.parsers.options import MODEL_OR_PATH, device_option, drafter_option, json_option


def verify(p: CommandParser) -> None:
    """Test that exact samplers are exact, on models small enough to enumerate, or on a model of yours.

    visar verify --samplers scd --sequences 16384 --no-mutants
    visar verify --model icons --samplers scd --sequences 16384
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
        help="sequences per row of the table, with --model tokens; 16384 or more",
    )
    p.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of all random numbers")
    p.add_argument("--no-mutants", action="store_true", help="leave out the known-bad samplers, which must fail")
    json_option(p, "the table")
    own = p.add_argument_group("A model of your own")
    own.add_argument(
        "--model",
        metavar=MODEL_OR_PATH,
        help="test the samplers on this model of any family: a name of `visar models`, a folder or a hub id",
    )
    own.add_argument("--prompt", metavar="PROMPT", help="the prompt of its images (default: a red heart)")
    own.add_argument("--class", dest="label", type=whole(), metavar="ID", help="or the class (default: 0)")
    own.add_argument("--image-size", type=size, metavar="PX|WxH", help="pixels, if it makes images of any size")
    drafter_option(own)
    device_option(own)
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
