"""The options of `visar train` and its commands."""

import argparse

from visar.cli.parsers.base import CommandParser, Group, add_commands, finite, names, positive, seed, whole
from visar.cli.parsers.options import device_option, model_options, sampling_options

DTYPES = ("float32", "float16", "bfloat16")
SMALL = ("int8", "int6", "float8_e4m3fn")
EMBEDDED = "or an embedded model's name"
WORDS = f"the folder of `visar train words`, {EMBEDDED}"
TOKENIZER = f"the `vq` of a tokenizer run, {EMBEDDED}"
VARIED = "zoom, shift and recolour the images for training"


def train(p: CommandParser) -> None:
    """Train a tokenizer, a model or a drafter, each on a folder of captioned images.

    visar train tokenizer --data images -o run/vq
    visar train drafter --captions captions.txt -o run/drafter
    """
    add_commands(p, images, words, tokenizer, autoencoder, ar, two_way, jacobi, mar, clip, drafter, assemble)


def images(p: CommandParser) -> None:
    """Build the image set of `icons` from packages with open licences.

    visar train images -o images
    visar train images -o images --styles 3d,noto,flat --size 64
    """
    p.add_argument("-o", "--out", required=True, metavar="FOLDER", help="a new folder, for the images")
    p.add_argument("--size", type=whole(8, 4096), default=128, metavar="PX", help="pixels")
    p.add_argument("--styles", type=names, default=[], metavar="NAMES", help="only these, separated by commas")
    p.add_argument("--tones", action="store_true", help="with skin tones")
    p.add_argument("--flags", action="store_true", help="with flags")


def words(p: CommandParser) -> None:
    """Make the text encoder's table of words.

    visar train words --data images -o words
    visar train words --data images.zip -o words
    """
    p.add_argument("--data", required=True, metavar="PATH", help="folder or zip of captioned images")
    p.add_argument("-o", "--out", required=True, metavar="FOLDER", help="a new folder, for the text encoder")


def tokenizer(p: CommandParser) -> None:
    """Train a VQ tokenizer.

    visar train tokenizer --data images -o run/vq
    visar train tokenizer --data images --size 128 --patch 2 --varied --init run/vq/vq -o run/vq-128
    """
    _autoencoder_options(p, "tokenizer", also=", and give white background one code")


def autoencoder(p: CommandParser) -> None:
    """Train a KL autoencoder, for continuous tokens.

    visar train autoencoder --data images -o run/ae
    visar train autoencoder --data images --size 128 --patch 2 --varied --init run/ae/vae -o run/ae-128
    """
    _autoencoder_options(p, "autoencoder")


def ar(p: CommandParser) -> None:
    """Train a text-conditional GPT on a tokenizer's tokens.

    visar train ar --data images --tokenizer run/vq/vq --words words -o run/ar
    visar train ar --data images --tokenizer run/vq/vq --words words --dim 128 --heads 2 --ffn 384 -o run/ar
    """
    _training_options(p, minutes=75, batch=32, lr=2.5e-3)
    _varied_tokens_options(p)
    model = p.add_argument_group("Model")
    model.add_argument("--init", metavar="MODEL|PATH", help="start from this GPT, which may have fewer --layers")
    model.add_argument("--any-order", action="store_true", help="a RandAR, which samples the cells in any order")
    model.add_argument("--tokenizer", required=True, metavar="MODEL|PATH", help=TOKENIZER)
    model.add_argument("--words", required=True, metavar="MODEL|PATH", help=WORDS)
    _sizes(model, dim=(256, "width"), layers=(6, "layers"), heads=(4, "attention heads"), ffn=(768, "inner width"))


def two_way(p: CommandParser) -> None:
    """Give a GPT two-way heads, with which it samples a diagonal in a pass; it becomes another model.

    visar train two-way --init run/ar/gpt --data images --tokenizer run/vq/vq --words words -o run/heads
    visar train two-way --stage 2 --init run/heads/gpt --data images --tokenizer run/vq/vq --words words -o run/all
    """
    _training_options(p, minutes=30, batch=32, lr=2.5e-3)
    _varied_tokens_options(p)
    model = p.add_argument_group("Model")
    model.add_argument("--init", required=True, metavar="MODEL|PATH", help="the GPT, in stage 2 that of stage 1")
    model.add_argument(
        "--stage", type=int, choices=(1, 2), default=1, help="train the heads on a frozen GPT (1), or all of it (2)"
    )
    model.add_argument(
        "--layers", type=whole(1, 1024), metavar="N", help="layers of the heads, in stage 1 (default: 1)"
    )
    model.add_argument("--tokenizer", required=True, metavar="MODEL|PATH", help=TOKENIZER)
    model.add_argument("--words", required=True, metavar="MODEL|PATH", help=WORDS)


def jacobi(p: CommandParser) -> None:
    """Tune a GPT on the drafts of its own windows, so that `scd` takes fewer passes; it becomes another model.

    visar train jacobi --captions captions.txt -o run/jacobi
    visar train jacobi --model my-model --captions images.zip -n 512 --minutes 40 -o run/jacobi
    """
    p.add_argument("--window", type=whole(2, 64), default=16, metavar="W", help="the window of `scd` to tune for")
    p.add_argument("--init", metavar="MODEL|PATH", help="go on with a GPT tuned before, on windows of its own")
    p.add_argument(
        "--hold",
        type=positive,
        default=10.0,
        metavar="X",
        help="how much clean tokens weigh, on which it hardly changes",
    )
    _sampled_options(p, images=512, minutes=40.0, batch=4, lr=2e-3)


def mar(p: CommandParser) -> None:
    """Train a text-conditional MAR on an autoencoder's latents.

    visar train mar --data images --autoencoder run/ae/vae --words words -o run/mar
    visar train mar --data images --autoencoder run/ae/vae --words words --dim 64 --layers 2 -o run/draft
    """
    _training_options(p, minutes=75, batch=32, lr=2.5e-3)
    data = p.add_argument_group("Data")
    data.add_argument("--varied", action="store_true", help=f"{VARIED}, and the captions as people type them")
    _weigh_option(data)
    model = p.add_argument_group("Model")
    model.add_argument("--init", metavar="MODEL|PATH", help="start from this MAR, of the same sizes and autoencoder")
    model.add_argument("--autoencoder", required=True, metavar="MODEL|PATH", help=f"the `vae` of its run, {EMBEDDED}")
    model.add_argument("--words", required=True, metavar="MODEL|PATH", help=WORDS)
    _sizes(
        model,
        dim=(128, "width"),
        layers=(6, "layers of the encoder, and of the decoder"),
        heads=(2, "attention heads"),
        head_width=(192, "width of the diffusion head"),
        head_layers=(3, "layers of the diffusion head"),
    )


def clip(p: CommandParser) -> None:
    """Train a small CLIP, which measures how well images follow their prompts.

    visar train clip --data images -o run/clip
    visar train clip --data images -o run/clip --stored-as int8 --no-compile
    """
    _training_options(p, minutes=27, batch=128, lr=3e-3)
    model = p.add_argument_group("Model")
    model.add_argument("--words", default="icons", metavar="MODEL|PATH", help=WORDS)
    _sizes(
        model,
        dim=(96, "width of both towers"),
        layers=(4, "layers for images"),
        text_layers=(2, "layers for text"),
        heads=(3, "attention heads"),
    )
    p.add_argument_group("Output").add_argument(
        "--stored-as",
        choices=("float32", "float16", "int8", "int6"),
        default="float16",
        help="dtype of the saved model",
    )


def drafter(p: CommandParser) -> None:
    """Train a drafter on images that its model samples.

    visar train drafter --model my-model --captions captions.txt --kind medusa -n 512 --minutes 10 -o run/medusa
    visar train drafter --captions captions.txt --kind model --acceptance --minutes 3 -o run/drafter
    """
    p.add_argument(
        "--kind",
        dest="drafter_kind",
        default="eagle",
        metavar="KIND",
        help="eagle, medusa, hydra, exit, skip or model",
    )
    p.add_argument(
        "--layers", type=whole(), metavar="N", help="before an exit (default: 2), in a skip (half) or a model (a third)"
    )
    p.add_argument(
        "--depth",
        type=whole(1, 64),
        metavar="N",
        help="tokens that an eagle, medusa or hydra learns to draft (default: 3)",
    )
    p.add_argument(
        "--acceptance",
        action="store_true",
        help="train the head of the drafter in --out, or else of the model's own, that says when to stop drafting",
    )
    output = _sampled_options(p, images=2048, minutes=25.0, batch=8, lr=2.5e-3)
    output.add_argument("--stored-as", choices=(*DTYPES, *SMALL), default="float16", help="dtype of the saved drafter")


def assemble(p: CommandParser) -> None:
    """Put the parts of a model together.

    visar train assemble --gpt run/ar/gpt --tokenizer run/vq/vq --words words -o my-model
    visar train assemble --mar run/mar/mar --autoencoder run/ae/vae --words words -o my-mar
    """
    for flag, what in (
        ("--gpt", "a GPT"),
        ("--tokenizer", "the tokenizer of the GPT"),
        ("--mar", "a MAR"),
        ("--autoencoder", "the autoencoder of the MAR"),
    ):
        p.add_argument(flag, metavar="MODEL|PATH", help=f"{what}: its folder, {EMBEDDED}")
    p.add_argument("--draft", metavar="FOLDER", help="a smaller MAR that drafts for it")
    p.add_argument("--words", required=True, metavar="MODEL|PATH", help=WORDS)
    p.add_argument("--guidance-scale", type=finite, default=3.0, metavar="X", help="the model's default")
    p.add_argument("--top-k", type=whole(0), default=0, metavar="N", help="the model's default; 0 for all tokens")
    output = p.add_argument_group("Output")
    output.add_argument("-o", "--out", required=True, metavar="FOLDER", help="a new folder, for the model")
    output.add_argument("--dtype", choices=DTYPES, default="float16", help="dtype of the saved model")
    output.add_argument("--gpt-dtype", choices=(*DTYPES, *SMALL), help="dtype of the --gpt, if not --dtype")
    output.add_argument("--draft-dtype", choices=(*DTYPES, *SMALL), help="dtype of the --draft (default: float16)")


def _sizes(group: Group, **sizes: tuple[int, str]) -> None:
    """Options of sizes, each a default and what it is."""
    for name, (default, what) in sizes.items():
        most = 65536 if name in ("dim", "ffn", "head_width") else 1024
        group.add_argument(f"--{name.replace('_', '-')}", type=whole(1, most), default=default, metavar="N", help=what)


def _autoencoder_options(p: CommandParser, what: str, also: str = "") -> None:
    _training_options(p, minutes=21, batch=16, lr=1.5e-3)
    p.add_argument_group("Data").add_argument("--varied", action="store_true", help=VARIED + also)
    model = p.add_argument_group("Model")
    model.add_argument("--init", metavar="MODEL|PATH", help=f"start from this {what}, which may have a smaller --patch")
    model.add_argument(
        "--patch", type=whole(1, 64), default=1, metavar="N", help="the first convolution reads blocks of N x N pixels"
    )
    training = p.add_argument_group("Training")
    training.add_argument(
        "--perceptual", type=positive, default=0.0, metavar="X", help="weight of a perceptual loss, of the extra eval"
    )
    training.add_argument(
        "--decoder-only", action="store_true", help="keep the encoder of --init, and so what models were trained on"
    )


def _varied_tokens_options(p: CommandParser) -> None:
    """Of training a GPT on the tokens of images."""
    data = p.add_argument_group("Data")
    data.add_argument(
        "--variants", type=whole(0, 10000), default=0, metavar="N", help="zoom, shift and recolour each image in N ways"
    )
    _weigh_option(data)


def _weigh_option(group: Group) -> None:
    group.add_argument(
        "--weigh",
        type=_weights,
        default={},
        metavar="NAME=X,...",
        help="take images of a style or group X times as often",
    )


def _image_options(group: Group) -> None:
    group.add_argument(
        "--styles", type=names, default=[], metavar="NAMES", help="only these styles of an image set, with commas"
    )
    group.add_argument(
        "--without-groups", type=names, default=[], metavar="NAMES", help="leave these groups of an image set out"
    )


def _sampled_options(p: CommandParser, images: int, minutes: float, batch: int, lr: float) -> Group:
    """Of training on what a model samples; returns the group of the output."""
    output = p.add_argument_group("Output")
    output.add_argument("-o", "--out", required=True, metavar="FOLDER", help="a new folder, or that of a run to resume")
    data = p.add_argument_group("Data")
    data.add_argument(
        "--captions", metavar="PATH", help="a file with a caption or class id in each line, or an image set"
    )
    _image_options(data)
    data.add_argument("-n", "--num-images", type=whole(2, 10**8), default=images, metavar="N", help="images to sample")
    training = p.add_argument_group("Training")
    end = training.add_mutually_exclusive_group()
    end.add_argument("--minutes", type=positive, default=minutes, metavar="X", help="how long to train")
    end.add_argument("--steps", type=whole(1), metavar="N", help="end after this many steps instead")
    _loop_options(training, batch=batch, lr=lr)
    model_options(p, quantize=False)  # nothing is trained for rounded weights
    sampling_options(p)
    return output


def _loop_options(group: Group, batch: int, lr: float) -> None:
    group.add_argument("--batch", type=whole(1), default=batch, metavar="N", help="images per step")
    group.add_argument("--lr", type=positive, default=lr, metavar="X", help="learning rate")
    group.add_argument("--no-compile", action="store_true", help="do not compile the model")


def _training_options(p: CommandParser, minutes: float, batch: int, lr: float) -> None:
    data = p.add_argument_group("Data")
    data.add_argument("--data", required=True, metavar="PATH", help="folder or zip of captioned images")
    data.add_argument("--size", type=whole(8, 4096), default=64, metavar="PX", help="pixels of the images")
    _image_options(data)
    p.add_argument_group("Output").add_argument(
        "-o", "--out", required=True, metavar="FOLDER", help="a new folder, or that of a run to resume"
    )
    training = p.add_argument_group("Training")
    training.add_argument("--minutes", type=positive, default=minutes, metavar="X", help="how long to train")
    _loop_options(training, batch, lr)
    training.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of all random numbers")
    device_option(training)


def _weights(text: str) -> dict[str, float]:
    pairs = [part.rpartition("=")[::2] for part in names(text)]
    try:
        found = {name.strip(): float(weight) for name, weight in pairs}
    except ValueError:
        found = {"": 0.0}
    if "" in found or len(found) < len(pairs) or not all(0 < weight <= 1000 for weight in found.values()):
        raise argparse.ArgumentTypeError(
            f"must be NAME=WEIGHT with weights above 0 and at most 1000, several separated by commas, not {text!r}"
        )
    return found
