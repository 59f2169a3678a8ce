"""The options of `visar bench`."""

from visar.cli.parsers.base import CommandParser, names, positive, whole
from visar.cli.parsers.options import json_option, model_options, sampler_options, sampling_options


def bench(p: CommandParser) -> None:
    """Measure the passes and the time per pass of several samplers in one run.

    visar bench --samplers ar,scd -n 2 --repeats 1
    visar bench --shapes B-256 --json shapes.json
    """
    what = p.add_mutually_exclusive_group()
    what.add_argument(
        "--shapes",
        nargs="?",
        const=[],
        type=names,
        metavar="NAMES",
        help="measure a pass of published sizes with random weights, such as XL-384,3B-384 (default: those that suit)",
    )
    what.add_argument("--profile", action="store_true", help="show where the time of a pass goes, for each sampler")
    what.add_argument(
        "--serve", action="store_true", help="load a server with clients, against static batches and one at a time"
    )
    p.add_argument(
        "--batch", type=whole(1), metavar="N",
        help="images at once (default: 1; --shapes on a GPU 1 and 8; rows of --serve 8)",
    )  # fmt: skip
    p.add_argument("--minutes", type=positive, metavar="M", help="of the soak of --serve (default: 0.5)")
    count = whole(1, 10**6)
    p.add_argument("-n", "--num-images", type=count, metavar="N", help="images per sampler and repeat (default: 16)")
    p.add_argument("--repeats", type=count, metavar="N", help="repeats, of which medians are shown (default: 3)")
    output = p.add_argument_group("Output")
    json_option(output, "the results")
    output.add_argument("--history", metavar="FILE", help="append this run to FILE, one JSON line for each run")
    output.add_argument("--against", metavar="FILE", help="print ratios to the last comparable run in FILE")
    model_options(p)
    sampler_options(p, several="ar,sjd,scd; for continuous tokens mar,mar-headspec")
    sampling_options(p)
