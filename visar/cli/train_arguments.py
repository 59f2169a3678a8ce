"""The options of `visar train` and its subcommands."""

from __future__ import annotations

import argparse

from visar.cli.arguments import Commands, _model_options, _names, _runner, _sampling_options


def train(commands: Commands) -> None:
    p = commands.add_parser("train", help="train a tokenizer or a model on a folder of captioned pictures")
    kinds = p.add_subparsers(dest="kind", required=True, metavar="KIND")

    pictures = kinds.add_parser("pictures", help="rebuild the picture set of `icons` from licensed packages")
    pictures.add_argument("--out", required=True)
    pictures.add_argument("--size", type=int, default=128)
    pictures.add_argument("--styles", type=_names, default=[])
    pictures.add_argument("--tones", action="store_true", help="with skin tones")
    pictures.add_argument("--flags", action="store_true", help="with flags")
    pictures.set_defaults(run=_runner("train", "pictures"))

    words = kinds.add_parser("words", help="make the word table of the text encoder")
    words.add_argument("--data", required=True)
    words.add_argument("--out", required=True)
    words.set_defaults(run=_runner("train", "words"))

    tokenizer = kinds.add_parser("tokenizer", help="train a VQ tokenizer")
    _training_options(tokenizer, minutes=21, batch=16, lr=1.5e-3)
    tokenizer.add_argument("--init", metavar="FOLDER", help="the weights to go on from; may be of a smaller --patch")
    tokenizer.add_argument(
        "--patch",
        type=int,
        default=1,
        help="pixels along one side that the first convolution reads at once (default: 1)",
    )
    tokenizer.add_argument(
        "--perceptual", type=float, default=0.0, help="weight of the perceptual term; needs the extra eval (default: 0)"
    )
    tokenizer.add_argument(
        "--varied",
        action="store_true",
        help="zoom, shift and recolour images in training, and give white background one code",
    )
    tokenizer.add_argument(
        "--decoder-only", action="store_true", help="leave encoder and codes of --init as they are, and so all tokens"
    )
    tokenizer.set_defaults(run=_runner("train", "tokenizer"))

    autoencoder = kinds.add_parser("autoencoder", help="train a KL autoencoder for continuous tokens")
    _training_options(autoencoder, minutes=21, batch=16, lr=1.5e-3)
    autoencoder.set_defaults(run=_runner("train", "autoencoder"))

    mar = kinds.add_parser("mar", help="train a text-conditional MAR on an autoencoder's latents")
    _training_options(mar, minutes=75, batch=32, lr=2.5e-3)
    mar.add_argument("--autoencoder", required=True, metavar="FOLDER", help="the `vae` folder of an autoencoder run")
    mar.add_argument("--words", required=True, metavar="FOLDER", help="the folder of `visar train words`")
    mar.add_argument("--dim", type=int, default=128)
    mar.add_argument("--layers", type=int, default=6, help="of the encoder, and as many of the decoder (default: 6)")
    mar.add_argument("--heads", type=int, default=2)
    mar.add_argument("--head-width", type=int, default=192, help="of the diffusion head (default: 192)")
    mar.add_argument("--head-layers", type=int, default=3)
    mar.set_defaults(run=_runner("train", "mar"))

    clip = kinds.add_parser("clip", help="train a small CLIP, which says whether pictures follow their prompts")
    _training_options(clip, minutes=27, batch=128, lr=3e-3)
    clip.add_argument(
        "--words", default="icons", metavar="FOLDER|NAME",
        help="of `visar train words`, or an embedded model: where vectors of words come from (default: icons)",
    )  # fmt: skip
    clip.add_argument("--dim", type=int, default=96, help="width of both towers (default: 96)")
    clip.add_argument("--layers", type=int, default=4, help="for pictures (default: 4)")
    clip.add_argument("--text-layers", type=int, default=2)
    clip.add_argument("--heads", type=int, default=3)
    clip.add_argument("--stored-as", choices=("float32", "float16", "float8_e4m3fn"), default="float16")
    clip.set_defaults(run=_runner("train", "clip"))

    ar = kinds.add_parser("ar", help="train a text-conditional GPT on a tokenizer's tokens")
    _training_options(ar, minutes=75, batch=32, lr=2.5e-3)
    ar.add_argument("--tokenizer", required=True, metavar="FOLDER", help="the `vq` folder of a tokenizer run")
    ar.add_argument("--words", required=True, metavar="FOLDER", help="the folder of `visar train words`")
    ar.add_argument("--dim", type=int, default=256)
    ar.add_argument("--layers", type=int, default=6)
    ar.add_argument("--heads", type=int, default=4)
    ar.add_argument("--ffn", type=int, default=768)
    ar.add_argument(
        "--init",
        metavar="FOLDER",
        help="the `gpt` folder of a run to go on from, of the same sizes or with fewer layers",
    )
    ar.add_argument(
        "--variants", type=int, default=0, metavar="N",
        help="learn N zoomed, shifted and recoloured variants of each image (default: the image alone)",
    )  # fmt: skip
    ar.add_argument(
        "--weigh", type=_weights, default={}, metavar="NAME=W,...",
        help="take images of these styles or groups W times as often",
    )  # fmt: skip
    ar.set_defaults(run=_runner("train", "ar"))

    drafter = kinds.add_parser("drafter", help="train a drafter on what a model draws itself")
    drafter.add_argument(
        "--kind",
        dest="drafter_kind",
        default="eagle",
        help="eagle, medusa, hydra, exit, skip or model (default: eagle)",
    )
    drafter.add_argument(
        "--layers", type=int, help="before an exit (default: 2), in a skip (half) or a model (a third)"
    )
    _model_options(drafter, "--target")
    _sampling_options(drafter)
    drafter.add_argument("--out", required=True, help="run folder; a run started again there goes on")
    drafter.add_argument("--captions", metavar="FILE", help="a caption or class id in each line; or a picture set")
    _picture_options(drafter)
    drafter.add_argument("--pictures", type=int, default=2048, help="how many to draw (default: 2048)")
    drafter.add_argument("--depth", type=int, default=3, help="tokens that it learns to draft (default: 3)")
    drafter.add_argument("--minutes", type=float, help="of training (default: 25)")
    drafter.add_argument("--steps", type=int, help="end after so many steps instead, whatever the time")
    drafter.add_argument("--batch", type=int, default=8)
    drafter.add_argument("--lr", type=float, default=2.5e-3)
    drafter.add_argument(
        "--stored-as", choices=("float32", "float16", "bfloat16", "float8_e4m3fn"), default="float16",
        help="dtype of the saved drafter (default: float16)",
    )  # fmt: skip
    drafter.add_argument("--no-compile", action="store_true")
    drafter.set_defaults(run=_runner("train", "drafter"))

    assemble = kinds.add_parser("assemble", help="put the parts of a model together as a pipeline")
    assemble.add_argument("--gpt", metavar="FOLDER")
    assemble.add_argument("--tokenizer", metavar="FOLDER", help="of the GPT")
    assemble.add_argument("--mar", metavar="FOLDER")
    assemble.add_argument("--autoencoder", metavar="FOLDER", help="of the MAR")
    assemble.add_argument("--draft", metavar="FOLDER", help="a smaller MAR that drafts for it")
    assemble.add_argument(
        "--words", required=True, metavar="FOLDER|NAME", help="or an embedded model, to use its words"
    )
    assemble.add_argument("--guidance-scale", type=float, default=3.0)
    assemble.add_argument("--top-k", type=int, default=0)
    assemble.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float16")
    assemble.add_argument(
        "--draft-dtype", choices=("float32", "float16", "bfloat16", "float8_e4m3fn"), default="float16"
    )
    assemble.add_argument("--out", required=True)
    assemble.set_defaults(run=_runner("train", "assemble"))


def _picture_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--styles", type=_names, default=[], help="of a picture set, only these styles, separated by commas")
    p.add_argument("--without-groups", type=_names, default=[], help="of a picture set, leave out these groups")


def _training_options(p: argparse.ArgumentParser, minutes: float, batch: int, lr: float) -> None:
    p.add_argument("--data", required=True, help="folder or zip of captioned pictures")
    p.add_argument("--out", required=True, help="run folder; a run started again there goes on")
    p.add_argument("--size", type=int, default=64, help="pixels (default: 64)")
    _picture_options(p)
    p.add_argument("--minutes", type=float, default=minutes)
    p.add_argument("--batch", type=int, default=batch)
    p.add_argument("--lr", type=float, default=lr)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto")
    p.add_argument("--no-compile", action="store_true")


def _weights(text: str) -> dict[str, float]:
    pairs = [part.rpartition("=") for part in text.split(",") if part]
    try:
        return {name.strip(): float(weight) for name, _, weight in pairs}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=WEIGHT,...") from error
