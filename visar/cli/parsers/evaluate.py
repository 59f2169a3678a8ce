"""The options of `visar eval` and its commands."""

from visar.cli.parsers.base import CommandParser, Group, add_commands, seed, whole
from visar.cli.parsers.options import (
    cluster_options,
    device_option,
    json_option,
    model_options,
    sampler_options,
    sampling_options,
)

PROTOCOL = "a name of `visar eval protocols`"


def eval_(p: CommandParser) -> None:
    """Measure images by named protocols, and whether a sampler changed them.

    visar eval protocols
    visar eval compare A B
    """
    add_commands(p, fid, clip, stats, compare, report, protocols)


def fid(p: CommandParser) -> None:
    """Measure the distance of images to reference images: FID and its relatives.

    visar eval fid images --protocol coco-30k-cleanfid256 --reference coco.npz
    visar eval fid run --protocol icons-efflite0 --reference photographs --json fid.json
    """
    p.add_argument("folder", metavar="FOLDER", help="a folder of images, or an .npz batch")
    p.add_argument("--protocol", required=True, metavar="PROTOCOL", help=PROTOCOL)
    p.add_argument("--reference", metavar="PATH", help="images, or statistics: of `visar eval stats`, or published")
    p.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of KID's subsets")
    _extractor_options(p)
    cluster_options(p)


def clip(p: CommandParser) -> None:
    """Measure how well images follow their prompts.

    visar eval clip run --protocol icons-clip
    visar eval clip images --captions captions.json --json clip.json
    """
    p.add_argument("folder", metavar="FOLDER", help="a folder of images, or an .npz batch")
    p.add_argument("--protocol", default="clip-vit-b32", metavar="PROTOCOL", help=PROTOCOL)
    p.add_argument("--captions", metavar="FILE", help="a JSON object of id and caption, if the folder has none")
    _extractor_options(p)
    cluster_options(p)


def stats(p: CommandParser) -> None:
    """Save the statistics of reference images for `visar eval fid`.

    visar eval stats coco/val2014 --protocol coco-30k-cleanfid256 -o coco.npz
    visar eval stats part-0.npz part-1.npz --protocol coco-30k-cleanfid256 -o all.npz
    """
    p.add_argument("sources", nargs="+", metavar="PATH", help="images, or statistics of parts of them to merge")
    p.add_argument("--protocol", required=True, metavar="PROTOCOL", help=PROTOCOL)
    p.add_argument("-o", "--out", required=True, metavar="FILE", help="an .npz file")
    _extractor_options(p)
    cluster_options(p)


def compare(p: CommandParser) -> None:
    """Test whether a faster sampler changed the images.

    visar eval compare A B
    visar eval compare A B --seeds A2 --clip icons-clip --json compared.json
    """
    p.add_argument("a", metavar="FOLDER_A", help="images of plain decoding")
    p.add_argument("b", metavar="FOLDER_B", help="images of the same prompts, best of the same seed")
    p.add_argument("--seeds", nargs="+", default=[], metavar="FOLDER", help="more images like A's, of other seeds")
    p.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of the permutation test")
    _comparing_options(p)
    _extractor_options(p)


def report(p: CommandParser) -> None:
    """Make a page that compares samplers: their speed and their images.

    visar eval report --samplers ar,scd -n 4 --speed-images 1 -o report
    visar eval report --samplers ar,sjd,scd,lantern++ --clip icons-clip -o report
    """
    p.add_argument("--prompts", metavar="FILE", help="as in `visar sample` (default: 48 common things)")
    p.add_argument("--classes", metavar="LIST|FILE", help="classes instead of prompts (default: all)")
    output = p.add_argument_group("Output")
    output.add_argument(
        "-n",
        "--num-images",
        type=whole(1, 10**6),
        metavar="N",
        help="images of each sampler (default: one a prompt)",
    )
    output.add_argument(
        "-o", "--out", required=True, metavar="FOLDER", help="a new folder, or that of the same report to resume it"
    )
    output.add_argument("--batch", type=whole(1), default=16, metavar="N", help="images decoded at once")
    output.add_argument(
        "--speed-images",
        type=whole(1, 10**6),
        default=8,
        metavar="N",
        help="images to measure speed, one at a time",
    )
    _comparing_options(p).add_argument("--weights", metavar="FILE", help="of the network of --protocol")
    model_options(p)
    sampler_options(p, several="ar,sjd,scd; the first is the one that the others are compared with")
    sampling_options(p)


def protocols(p: CommandParser) -> None:
    """List the protocols.

    visar eval protocols
    visar eval protocols --json
    """
    json_option(p, "the table")


def _comparing_options(p: CommandParser) -> Group:
    group = p.add_argument_group("Comparison")
    group.add_argument("--reference", metavar="PATH", help="images that no model made")
    group.add_argument("--protocol", default="icons-efflite0", metavar="PROTOCOL", help="whose features to compare")
    group.add_argument(
        "--clip", metavar="PROTOCOL", help="also compare how images follow their prompts, by such as clip-vit-b32"
    )
    group.add_argument("--clip-weights", metavar="FILE", help="of the network of --clip")
    return group


def _extractor_options(p: CommandParser) -> None:
    group = p.add_argument_group("Network")
    group.add_argument("--weights", metavar="FILE", help="weights of the protocol's network, if not to be downloaded")
    device_option(group)
    group.add_argument("--batch", type=whole(1), default=32, metavar="N", help="images at once")
    json_option(p.add_argument_group("Output"), "the results")
