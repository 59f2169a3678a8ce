"""The options of the subcommands, and which function runs each; `eval` and `train` have files of their own."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

Commands = Any  # argparse keeps the type of its subparsers to itself


def _runner(module: str, function: str) -> Callable[[argparse.Namespace], int]:
    return lambda options: getattr(importlib.import_module(f"visar.cli.{module}"), function)(options)


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _model_options(p: argparse.ArgumentParser, flag: str = "--model", several: bool = False) -> None:
    what: dict[str, Any] = {"dest": "models", "action": "append"} if several else {"dest": "model", "default": "icons"}
    default = "; repeatable (default: icons and icons-mar)" if several else " (default: icons)"
    p.add_argument(flag, metavar="NAME|PATH", help=f"a name of `visar models`, a folder, or a hub id{default}", **what)
    p.add_argument("--vq", metavar="FILE", help="tokenizer file, when --model is a published .pt file")
    p.add_argument("--vae", metavar="FILE", help="kl16.ckpt, when --model is MAR's checkpoint-last.pth")
    p.add_argument("--text-encoder", metavar="PATH", help="folder or hub id of FLAN-T5-XL, for a published text model")
    p.add_argument("--image-size", type=int, metavar="PX", help="pixels, for a published .pt file")
    p.add_argument("--num-heads", type=int, metavar="N", help="attention heads, for a .pt file of a size of your own")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"),
        help="default: bfloat16, or float32 where the processor has none and for a MAR on a CPU",
    )  # fmt: skip
    if flag == "--model":  # what is trained for is never quantised
        p.add_argument(
            "--quantize", choices=("int8", "fp8"), help="weights of a GPT in 8 bits: another, smaller model"
        )  # fmt: skip


def _sampling_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--guidance-scale", type=float, metavar="S", help="default: the model's own")
    p.add_argument("--temperature", type=float, metavar="T", help="default: the model's own, mostly 1")
    p.add_argument("--top-k", type=int, metavar="K", help="0 keeps all tokens; default: the model's own")
    p.add_argument("--top-p", type=float, default=1.0, metavar="P")


def _decoding_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--guidance-schedule", choices=("linear", "constant"), help="of a MAR; default: the model's own")
    p.add_argument("--window", type=int, metavar="W", help="tokens per pass of a window sampler")
    p.add_argument(
        "--drafter", action="append", default=[], metavar="PATH",
        help="folder or released file of a drafter, or a smaller model, where needed; repeatable, one of each kind",
    )  # fmt: skip
    p.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="parameters",
        help="a parameter of the sampler, such as gamma=6 or tree=4x2x1 (see `visar samplers NAME`); repeatable",
    )  # fmt: skip


def generate(commands: Commands) -> None:
    p = commands.add_parser("generate", help="make images from prompts or classes")
    p.add_argument("prompt", nargs="*", help='in quotes: "a red heart, 3d"; each makes an image')
    p.add_argument(
        "--class", dest="classes", type=int, action="append", metavar="ID", help="ImageNet class; repeatable"
    )
    p.add_argument("--sampler", metavar="S", help="a name of `visar samplers`")
    p.add_argument("-n", "--num-images", type=int, default=1, metavar="N", help="images per prompt")
    p.add_argument("-o", "--output", metavar="PATH", help="a .png file, or a folder (default: the current one)")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    _model_options(p)
    _sampling_options(p)
    _decoding_options(p)
    p.set_defaults(run=_runner("generate", "generate"))


def sample(commands: Commands) -> None:
    p = commands.add_parser("sample", help="draw thousands of images into a folder; goes on where it was stopped")
    p.add_argument(
        "--prompts", metavar="FILE", help='.txt, a prompt in each line, or .jsonl, {"prompt": ..., "id": ...}'
    )
    p.add_argument("--classes", metavar="LIST|FILE", help="of a class model, such as 0-999 or 1,5,7-9")
    p.add_argument(
        "-n", "--num-images", type=int, metavar="N", help="in all; image i has prompt i %% P (default: one of each)"
    )
    p.add_argument("--out", required=True, metavar="FOLDER", help="a run started again there goes on")
    p.add_argument("--batch", type=int, default=16, help="images decoded at once, at most (default: 16)")
    p.add_argument("--sampler", metavar="S", help="a name of `visar samplers`")
    p.add_argument("--tokens", action="store_true", help="put the tokens of each image into the manifest")
    p.add_argument("--npz", metavar="FILE", help="also write the images as ADM's evaluator reads them")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    _model_options(p)
    _sampling_options(p)
    _decoding_options(p)
    p.set_defaults(run=_runner("sample", "sample"))


def export(commands: Commands) -> None:
    p = commands.add_parser("export", help="write a folder of `visar sample` in the layout of an evaluator")
    p.add_argument("folder", metavar="DIR", help="a finished run")
    p.add_argument("--layout", required=True, choices=("npz", "geneval", "dpg"))
    p.add_argument("out", metavar="OUT", help="a .npz file, or a folder that is new or empty")
    p.set_defaults(run=_runner("sample", "export"))


def demo(commands: Commands) -> None:
    p = commands.add_parser("demo", help="serve a page where images can be watched while they are decoded")
    _model_options(p, several=True)
    p.add_argument(
        "--drafter", action="append", default=[], metavar="PATH", help="as of generate, for a model given alone"
    )
    p.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (default: 127.0.0.1)")
    p.add_argument("--port", type=int, default=7860, help="0 for any that is free (default: 7860)")
    p.add_argument("--share", action="store_true", help="also serve it through a public address of Gradio's")
    p.add_argument("--max-images", type=int, default=4, metavar="N", help="images of a request, at most (default: 4)")
    p.add_argument("--max-waiting", type=int, default=16, metavar="N", help="requests that may wait (default: 16)")
    p.set_defaults(run=_runner("demo", "demo"))


def models(commands: Commands) -> None:
    p = commands.add_parser("models", help="list the models")
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=_runner("tables", "models"))


def samplers(commands: Commands) -> None:
    p = commands.add_parser("samplers", help="list the samplers, or the parameters of one")
    p.add_argument("name", nargs="?", metavar="NAME", help="say what the parameters of this one are")
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=_runner("tables", "samplers"))


def verify(commands: Commands) -> None:
    p = commands.add_parser("verify", help="prove on models whose law is known that the exact samplers are exact")
    p.add_argument("--sampler", metavar="NAMES", type=_names, help="only these, separated by commas; or all")
    p.add_argument("--sequences", type=int, default=131072, help="sequences per row of the table (default: 131072)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--no-mutants", action="store_true", help="leave out the planted mistakes")
    p.add_argument(
        "--session", metavar="FILE.py:MAKE",
        help="test a Session of your own instead: make(batch, window) gives one; the file is run, so trust it",
    )  # fmt: skip
    p.add_argument(
        "--reference", metavar="FILE.py:LOGITS",
        help="of your --session: logits(tokens [B, n]) gives [B, n + 1, V], by the model itself; else its AR passes",
    )  # fmt: skip
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=_runner("verify", "verify"))


def bench(commands: Commands) -> None:
    p = commands.add_parser("bench", help="measure passes and time per pass, all samplers in one run")
    what = p.add_mutually_exclusive_group()
    what.add_argument(
        "--shapes", nargs="?", const=[], type=_names, metavar="NAMES",
        help="what a pass of published shapes costs, with random weights: XL-384,3B-384 (default: what suits)",
    )  # fmt: skip
    what.add_argument("--profile", action="store_true", help="where the time of a pass goes, of each sampler")
    p.add_argument(
        "--samplers", type=_names, metavar="NAMES",
        help="separated by commas, each a name or name:NAME=VALUE (default: ar,sjd,scd; of a MAR mar,mar-headspec)",
    )  # fmt: skip
    p.add_argument("--batch", type=int, help="images decoded at once (default: 1; of --shapes on a GPU 1 and 8)")
    p.add_argument("--images", type=int, default=16, help="images per sampler and repeat (default: 16)")
    p.add_argument("--repeats", type=int, default=3, help="medians are over these (default: 3)")
    p.add_argument("--json", metavar="PATH", help="also write the figures to this file")
    _model_options(p)
    _sampling_options(p)
    _decoding_options(p)
    p.add_argument("--history", metavar="FILE", help="append this run to FILE, one JSON line a run")
    p.add_argument("--against", metavar="FILE", help="print ratios to the last comparable run in FILE")
    p.set_defaults(run=_runner("bench", "bench"))
