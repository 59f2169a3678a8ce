"""The options of `visar eval` and its subcommands."""

from __future__ import annotations

import argparse

from visar.cli.arguments import Commands, _decoding_options, _model_options, _names, _runner, _sampling_options


def evaluate(commands: Commands) -> None:
    p = commands.add_parser("eval", help="measure images by a named protocol, and whether a sampler changed them")
    kinds = p.add_subparsers(dest="kind", required=True, metavar="KIND")

    fid = kinds.add_parser("fid", help="distances to reference images: FID and its relatives, by protocol")
    fid.add_argument("folder", metavar="IMAGES", help="a folder of images, or an .npz batch")
    fid.add_argument("--protocol", required=True, metavar="NAME", help="a name of `visar eval protocols`")
    fid.add_argument("--reference", metavar="PATH", help="images, or statistics of `visar eval stats` or as published")
    fid.add_argument("--seed", type=int, default=0, help="of KID's subsets")
    _extractor_options(fid)
    fid.set_defaults(run=_runner("evaluate", "fid"))

    clip = kinds.add_parser("clip", help="how well images follow their prompts")
    clip.add_argument("folder", metavar="IMAGES")
    clip.add_argument("--protocol", default="clip-vit-b32", metavar="NAME", help="(default: clip-vit-b32)")
    clip.add_argument("--captions", metavar="FILE", help="a JSON object of id and caption, where the folder has none")
    _extractor_options(clip)
    clip.set_defaults(run=_runner("evaluate", "clip"))

    stats = kinds.add_parser("stats", help="statistics of reference images, to be used again")
    stats.add_argument("sources", nargs="+", metavar="SOURCE", help="images, or statistics of parts of them, to merge")
    stats.add_argument("--protocol", required=True, metavar="NAME")
    stats.add_argument("--out", required=True, metavar="FILE", help="an .npz file")
    _extractor_options(stats)
    stats.set_defaults(run=_runner("evaluate", "stats"))

    compare = kinds.add_parser("compare", help="did a faster sampler change the images?")
    compare.add_argument("a", metavar="A", help="images of plain decoding")
    compare.add_argument("b", metavar="B", help="images of the same prompts, best under the same seed")
    compare.add_argument("--seeds", nargs="+", default=[], metavar="FOLDER", help="more of A's, under other seeds")
    _comparing_options(compare)
    compare.add_argument("--seed", type=int, default=0, help="of the relabellings (default: 0)")
    _extractor_options(compare)
    compare.set_defaults(run=_runner("evaluate", "compare"))

    report = kinds.add_parser("report", help="a page of samplers: speed, images, and whether these changed")
    report.add_argument(
        "--samplers", type=_names, metavar="NAMES", help="as in `visar bench`; the others are compared with the first"
    )  # fmt: skip
    report.add_argument("--prompts", metavar="FILE", help="as in `visar sample` (default: 48 common things)")
    report.add_argument("--classes", metavar="LIST|FILE", help="of a class model (default: all)")
    report.add_argument("-n", "--num-images", type=int, metavar="N", help="of each sampler (default: one per prompt)")
    report.add_argument("--out", required=True, metavar="FOLDER", help="a report that was cut short goes on there")
    report.add_argument("--batch", type=int, default=16, help="images decoded at once (default: 16)")
    report.add_argument("--speed-images", type=int, default=8, help="images to time, one at a time (default: 8)")
    _comparing_options(report)
    report.add_argument("--weights", metavar="FILE", help="of the network of --protocol")
    _model_options(report)
    _sampling_options(report)
    _decoding_options(report)
    report.set_defaults(run=_runner("evaluate", "report"))

    protocols = kinds.add_parser("protocols", help="list the protocols")
    protocols.add_argument("--json", action="store_true")
    protocols.set_defaults(run=_runner("evaluate", "protocols"))


def _comparing_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--reference", metavar="IMAGES", help="images that no model made")
    p.add_argument(
        "--protocol", default="icons-efflite0", metavar="NAME", help="whose features (default: icons-efflite0)"
    )
    p.add_argument("--clip", metavar="NAME", help="also compare scores by this protocol, such as clip-vit-b32")
    p.add_argument("--clip-weights", metavar="FILE", help="of the network of --clip")


def _extractor_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--weights", metavar="FILE", help="of the network of --protocol, where it cannot be downloaded")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    p.add_argument("--batch", type=int, default=32, help="images looked at together (default: 32)")
    p.add_argument("--json", metavar="PATH", help="also write the figures to this file")
