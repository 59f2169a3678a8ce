"""The options of `visar generate`."""

from visar.cli.parsers.base import CommandParser, whole
from visar.cli.parsers.options import json_option, model_options, sampler_options, sampling_options

MOST = 10000  # images of a call, which are decoded at once
LARGEST = 64  # times the pixels
FORMS = ("auto", "kitty", "iterm", "sixel", "blocks", "none")


def generate(p: CommandParser) -> None:
    """Make images from prompts or classes.

    visar generate "a red heart, 3d" -o heart.png
    visar generate "a red heart, 3d" "a sun, flat" -n 2 --sampler sjd --set window=8 -o images
    """
    p.add_argument("prompt", nargs="*", metavar="PROMPT", help='a text in quotes, such as "a red heart, 3d"')
    p.add_argument(
        "--class",
        dest="classes",
        type=whole(),
        action="append",
        metavar="ID",
        help="an ImageNet class instead of a prompt; repeatable",
    )
    output = p.add_argument_group("Output")
    output.add_argument(
        "-n",
        "--num-images",
        type=whole(1),
        default=1,
        metavar="N",
        help="images for each prompt or class",
    )
    output.add_argument(
        "-o", "--out", metavar="PATH", help="a .png file, or a folder for files named after the prompts (default: .)"
    )
    output.add_argument("--scale", type=whole(1, LARGEST), default=1, metavar="N", help="write N x N pixels for each")
    output.add_argument("--grid", action="store_true", help="write all images as one, in rows")
    output.add_argument(
        "--preview", choices=FORMS, default="auto",
        help="show images while they are decoded, on a terminal; each look takes a little time (default: what it can)",
    )  # fmt: skip
    output.add_argument("--force", action="store_true", help="overwrite files that exist")
    json_option(output, "the stats")
    model_options(p)
    sampler_options(p)
    sampling_options(p)
