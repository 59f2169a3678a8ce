"""A contact sheet of what people type first, and how well its drawings follow the prompts.

`python -m visar.eval.report.prompt_sheet --model FOLDER --out sheet.png` generates `--seeds` images for each of 60
prompts at the model's own settings: 30 common nouns, and 30 things that a seed draws from the model's list of things.
Images next to one another are of one prompt, which is below them. `--score` adds how often `icons-clip` finds the
right caption among 100: R-precision as of AttnGAN (Xu et al. 2018, arXiv:1711.10485), of things alone.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from visar.errors import VisarError
from visar.files import replacing, writable_folder
from visar.generation.model import ImageModel
from visar.text_encoders.concepts import concepts
from visar.text_encoders.spelling import stems, words_of

NOUNS = (
    "cat", "house", "car", "flower", "tree", "dog", "sun", "person", "birthday cake", "rocket", "robot", "boat",
    "mountain", "lion", "pizza", "guitar", "red apple", "heart", "smiling face", "fish", "bird", "airplane", "book",
    "cup of coffee", "star", "horse", "clock", "globe", "banana", "shoe",
)  # fmt: skip
CAPTIONS = 100  # of which one is right


def things(known: Sequence[str], more: int = 30, seed: int = 7) -> tuple[list[str], list[str]]:
    """`NOUNS` with `more` drawn from the `known` names of at most three words, and the names that are left."""
    names = [n for n in sorted(set(known) - set(NOUNS)) if len(n.split()) <= 3]
    drawn = random.Random(seed).sample(names, min(more, len(names)))
    return [*NOUNS, *drawn], [n for n in names if n not in drawn]


def drawings(model: ImageModel, prompts: Sequence[str], seeds: int = 2, first: int = 0) -> list[list[Image.Image]]:
    """The images of each prompt, of `seeds` seeds from the `first` on."""
    rows = [list(model.generate(list(prompts), seed=first + k).images or ()) for k in range(seeds)]
    return [list(images) for images in zip(*rows, strict=True)]


def prompt_sheet(
    prompts: Sequence[str], images: Sequence[Sequence[Image.Image]], side: int = 128, columns: int = 3
) -> Image.Image:
    """The images of each prompt next to one another with the prompt below, cut if need be, `columns` in a row."""
    text, rows, seeds = 14, -(-len(prompts) // columns), max(map(len, images))
    most = seeds * side // 6  # letters
    canvas = Image.new("RGB", (columns * (seeds * side + 6), rows * (side + text)), "white")
    writer = ImageDraw.Draw(canvas)
    for i, prompt in enumerate(prompts):
        x, y = i % columns * (seeds * side + 6), i // columns * (side + text)
        for k, image in enumerate(images[i]):
            canvas.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x + k * side, y))
        writer.text((x + 2, y + side), prompt if len(prompt) <= most else f"{prompt[: most - 1]}…", fill="black")
    return canvas


def words_in(name: str) -> set[str]:
    """The words of a name, in all their forms."""
    return {form for word in words_of(name) for form in stems(word)}


def r_precision(
    named: Sequence[str], images: Sequence[Sequence[Image.Image]], others: Sequence[str], style: str = "", seed: int = 1
) -> dict[str, float]:
    """How often the caption of an image is the first, or among five, of it and 99 of the `others` by `icons-clip`.

    `named` are the things without a style, which all captions get. None of the 99 shares a word with the right one: a
    red heart is no wrong heart. Nouns are those of `NOUNS`.
    """
    from torchvision.transforms.functional import pil_to_tensor

    from visar.eval.quality.extractors.icons_clip import icons_clip

    clip, rng, ends = icons_clip(), random.Random(seed), f", {style}" if style else ""
    found: dict[str, list[bool]] = {"first": [], "among_five": [], "first_of_nouns": []}
    for name, several in zip(named, images, strict=True):
        apart = [thing for thing in others if words_in(name).isdisjoint(words_in(thing))]
        if len(apart) < CAPTIONS - 1:
            raise VisarError(f"The score needs {CAPTIONS - 1} other things; the model's list has {len(apart)}.")
        for image in several:
            wrong = rng.sample(apart, CAPTIONS - 1)
            texts = clip.texts([f"{thing}{ends}" for thing in (name, *wrong)])
            cosines = (clip(pil_to_tensor(image.convert("RGB"))[None])["pool"] @ texts.T)[0]
            rank = int((cosines > cosines[0]).sum())
            found["first"].append(rank == 0)
            found["among_five"].append(rank < 5)
            found["first_of_nouns"] += [rank == 0] if name in NOUNS else []
    shares = {key: round(sum(hits) / len(hits), 3) for key, hits in found.items() if hits}
    return {"images": len(found["first"]), **shares, "chance": 1 / CAPTIONS}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", default="icons")
    options.add_argument("--out", required=True)
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument("--style", default="3d", help="put after each prompt; '' for none")
    options.add_argument("--things-of", metavar="MODEL", help="the model whose list has the things (default: --model)")
    options.add_argument("--score", action="store_true", help="print the R-precision by icons-clip, as JSON")
    given = options.parse_args()
    try:
        if given.seeds < 1:
            raise VisarError(f"--seeds must be 1 or more, not {given.seeds}.")
        writable_folder(Path(given.out).absolute().parent)
        named, others = things(concepts(given.things_of or given.model).names())
        model = ImageModel.load(given.model)
        model.bar = {"disable": True}
        ends = f", {given.style}" if given.style else ""
        prompts = [f"{'the' if name == 'sun' else 'a'} {name}{ends}" for name in named]
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            images = drawings(model, prompts, given.seeds)
            score = r_precision(named, images, others, given.style) if given.score else None
        with replacing(Path(given.out)) as temporary:
            prompt_sheet(prompts, images).save(temporary, "PNG")
    except VisarError as error:
        print(f"visar: error: {error}", file=sys.stderr)
        return 2
    if score is not None:
        print(json.dumps(score))
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
