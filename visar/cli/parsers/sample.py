"""The options of `visar sample` and `visar export`."""

from visar.cli.parsers.base import CommandParser, whole
from visar.cli.parsers.options import cluster_options, json_option, model_options, sampler_options, sampling_options


def sample(p: CommandParser) -> None:
    """Make thousands of images in a folder; an interrupted run resumes there.

    visar sample --prompts prompts.txt -n 2048 -o run
    visar sample --prompts prompts.txt -n 2048 --sampler ar --batch 32 --json -o run-ar
    """
    p.add_argument(
        "--prompts", metavar="FILE", help='.txt with a prompt in each line, or .jsonl of {"prompt": ..., "id": ...}'
    )
    p.add_argument("--classes", metavar="LIST|FILE", help="ImageNet classes instead of prompts, such as 0-999 or 1,5,7")
    output = p.add_argument_group("Output")
    output.add_argument(
        "-n",
        "--num-images",
        type=whole(1, 10**8),
        metavar="N",
        help="images in all; image i has prompt i %% P (default: one for each prompt or class)",
    )
    output.add_argument("-o", "--out", required=True, metavar="FOLDER", help="a new folder, or that of the same run")
    output.add_argument("--batch", type=whole(1), default=16, metavar="N", help="images decoded at once")
    output.add_argument("--tokens", action="store_true", help="write the tokens of each image to the manifest")
    output.add_argument(
        "--npz", metavar="FILE", help="also write all images to one .npz file, as ADM's evaluator reads"
    )
    json_option(output, "the summary")
    cluster_options(p)
    model_options(p)
    sampler_options(p)
    sampling_options(p)


def export(p: CommandParser) -> None:
    """Write a folder of `visar sample` in the layout that an evaluator reads.

    visar export run --layout npz -o run.npz
    visar export run --layout geneval -o geneval
    """
    p.add_argument("folder", metavar="FOLDER", help="a finished run of `visar sample`")
    p.add_argument("--layout", required=True, choices=("npz", "geneval", "dpg"), help="the evaluator's layout")
    p.add_argument("-o", "--out", required=True, metavar="PATH", help="a .npz file, or a folder that is new or empty")
