"""Groups of options that several commands share; those of sampling are the fields of `SamplingParams`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any

from visar.cli.parsers.base import STDOUT, CommandParser, Group, json_target, names, size, whole
from visar.errors import VisarError
from visar.params import ANY_ORDER, SamplingParams

RANDOM = "random"  # as a seed
KINDS: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "int": (int, "a whole number", "N"),
    "float": (float, "a number", "X"),
    "str": (str, "text", "TEXT"),
}
MODEL_OR_PATH = "MODEL|PATH"


def sampling_options(parser: CommandParser) -> None:
    """A flag for each setting of sampling."""
    group = parser.add_argument_group("Sampling")
    for f in _settings():
        choices = f.metadata["choices"] or None
        notes = [f.metadata["help"]]
        notes += [f"only for {only} tokens"] if (only := f.metadata["only"]) not in ("", ANY_ORDER) else []
        if str(f.type).startswith("bool"):
            group.add_argument(f"--{f.name}", action="store_true", default=None, help="; ".join(notes))
            continue
        notes += [f"{RANDOM} picks one and says which"] if f.name == "seed" else []
        default = "the model's own" if f.default is None else f.default
        value = f"N|{RANDOM}" if f.name == "seed" else _kind(f)[2]
        group.add_argument(
            f"--{f.name.replace('_', '-')}",
            type=_reader(f),
            choices=choices,
            default=f.default,
            metavar=None if choices else value,
            help=f"{'; '.join(notes)} (default: {default})",
        )


def params_of(options: argparse.Namespace) -> SamplingParams:
    """The settings that the options give. For `--seed random` this picks a seed and says which: call it once."""
    params = SamplingParams(**{f.name: getattr(options, f.name) for f in _settings()})
    if params.seed is None:
        params = params.resolved(params)
        print(f"visar: note: the seed is {params.seed}", file=sys.stderr)
    return params


def settings_of(params: SamplingParams) -> dict[str, Any]:
    """Those that are given, by name, the seed among them."""
    return {f.name: value for f in _settings() if (value := getattr(params, f.name)) is not None}


def _settings() -> list[Field[Any]]:
    """The fields that have a flag."""
    return [f for f in fields(SamplingParams) if f.metadata["flag"]]


def _kind(f: Field[Any]) -> tuple[Callable[[str], Any], str, str]:
    return KINDS[str(f.type).partition(" ")[0]]


def _reader(f: Field[Any]) -> Callable[[str], Any]:
    """The type of a setting's flag."""
    kind, noun, _ = _kind(f)

    def read(text: str) -> Any:
        if f.name == "seed" and text == RANDOM:
            return None
        try:
            value = kind(text)
        except ValueError as error:
            also = f" or {RANDOM}" if f.name == "seed" else ""
            raise argparse.ArgumentTypeError(f"must be {noun}{also}, not {text!r}") from error
        if not f.metadata["choices"]:
            try:
                SamplingParams(**{f.name: value})
            except VisarError as error:
                raise argparse.ArgumentTypeError(str(error).removeprefix(f.name).strip(" .")) from error
        return value

    return read


def cluster_options(parser: CommandParser) -> None:
    """Workers on a Ray cluster."""
    group = parser.add_argument_group("Many machines")
    group.add_argument("--launcher", choices=("ray",), help="share the work among workers on a Ray cluster")
    group.add_argument("--workers", type=whole(1), metavar="N", help="how many (default: one for each GPU, or one)")
    group.add_argument(
        "--ray-address", metavar="ADDRESS", help='"auto", or host:port (default: a cluster of this machine alone)'
    )


def model_options(parser: CommandParser, *, several: str = "", quantize: bool = True) -> None:
    """Which model, on which device, in which dtype; of `several` models, the text says which are the default."""
    group = parser.add_argument_group("Model")
    what = "a name of `visar models`, a folder, a hub id, or a published weights file"
    if several:
        group.add_argument(
            "--model",
            dest="models",
            action="append",
            metavar=MODEL_OR_PATH,
            help=f"{what}; repeatable (default: {several})",
        )
    else:
        group.add_argument("--model", default="icons", metavar=MODEL_OR_PATH, help=what)
    group.add_argument("--vq", metavar="FILE", help="the tokenizer file, if --model is a LlamaGen file")
    group.add_argument("--vae", metavar="FILE", help="the autoencoder file, kl16.ckpt, if --model is a MAR file")
    group.add_argument(
        "--text-encoder", metavar="PATH", help="folder or hub id of FLAN-T5-XL, if --model is a text model's file"
    )
    group.add_argument(
        "--image-size",
        type=size,
        metavar="PX|WxH",
        help="pixels, if --model is a LlamaGen file, or makes images of any size: width x height, such as 1024x768",
    )
    group.add_argument(
        "--num-heads", type=whole(1), metavar="N", help="attention heads, if --model is a file of an unpublished size"
    )
    group.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="take the averaged weights of a published file (default: of a MAR only)",
    )
    device_option(group)
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the numbers (default: the fastest on this device, bfloat16 or float32)",
    )
    if quantize:
        group.add_argument(
            "--quantize", choices=("int8", "fp8"), help="round the weights to 8 bits; this changes the distribution"
        )


def device_option(group: Group) -> None:
    group.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:1")


def sampler_options(parser: CommandParser, *, several: str = "", repeatable: str = "") -> None:
    """Which sampler and its parameters; of `several` or `repeatable` ones, the text says which are the default."""
    group = parser.add_argument_group("Sampler")
    if several:
        group.add_argument(
            "--samplers",
            type=names,
            metavar="SAMPLERS",
            help=f"names of `visar samplers`, separated by commas; with parameters: sjd:window=8 (default: {several})",
        )
    elif repeatable:
        group.add_argument(
            "--sampler",
            dest="samplers",
            action="append",
            metavar="SAMPLER",
            help=f"a name of `visar samplers`, also with parameters: sjd:window=8; repeatable (default: {repeatable})",
        )
    else:
        group.add_argument(
            "--sampler",
            metavar="SAMPLER",
            help="a name of `visar samplers`, or FILE.py:NAME (default: scd, or mar-headspec for continuous tokens)",
        )
    group.add_argument("--window", type=whole(), metavar="N", help="tokens per pass, for samplers with a window")
    drafter_option(group)
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="parameters",
        help="a parameter of the sampler, such as gamma=6 (see `visar samplers NAME`); repeatable",
    )


def drafter_option(group: Group) -> None:
    group.add_argument(
        "--drafter",
        action="append",
        default=[],
        metavar="PATH",
        help="a drafter's folder or published file, or a smaller model; repeatable, one of each kind",
    )


def json_option(group: Group, what: str = "the result") -> None:
    """`--json`, alone or with a file."""
    group.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        type=json_target,
        metavar="PATH",
        help=f"write {what} as JSON to a .json file, which is replaced, or with - or nothing to stdout instead of text",
    )
