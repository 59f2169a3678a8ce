"""A contact sheet of what people type first, to be looked at.

`python -m visar.eval.report.prompt_sheet --model FOLDER --out sheet.png` generates `--seeds` images for every prompt of
`PROMPTS`, at the model's own settings. Images next to one another are of one prompt, which is below them.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from PIL import Image, ImageDraw

from visar.errors import VisarError
from visar.files import replacing, writable_folder
from visar.generation.model import ImageModel

PROMPTS = (
    "a cat", "a house", "a car", "a flower", "a tree", "a dog", "the sun", "a person", "a birthday cake", "a rocket",
    "a robot", "a boat", "a mountain", "a lion", "a pizza", "a guitar", "a red apple", "a heart", "a smiling face",
    "a fish", "a bird", "an airplane", "a book", "a cup of coffee", "a star",
)  # fmt: skip


def prompt_sheet(
    model: ImageModel, prompts: tuple[str, ...] = PROMPTS, seeds: int = 2, side: int = 128, columns: int = 3
) -> Image.Image:
    """`seeds` images of each prompt next to one another with the prompt below, `columns` prompts in a row."""
    text, rows = 14, -(-len(prompts) // columns)
    canvas = Image.new("RGB", (columns * (seeds * side + 6), rows * (side + text)), "white")
    writer = ImageDraw.Draw(canvas)
    for i, prompt in enumerate(prompts):
        x, y = i % columns * (seeds * side + 6), i // columns * (side + text)
        for k, image in enumerate(model.generate(prompt, num_images=seeds).images or ()):
            canvas.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x + k * side, y))
        writer.text((x + 2, y + side), prompt, fill="black")
    return canvas


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", default="icons")
    options.add_argument("--out", required=True)
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument("--style", default="", help="put after each prompt")
    given = options.parse_args()
    try:
        if given.seeds < 1:
            raise VisarError(f"--seeds must be 1 or more, not {given.seeds}.")
        writable_folder(Path(given.out).absolute().parent)
        model = ImageModel.load(given.model)
        model.bar = {"disable": True}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prompts = tuple(f"{p}, {given.style}" if given.style else p for p in PROMPTS)
            sheet = prompt_sheet(model, prompts, given.seeds)
        with replacing(Path(given.out)) as temporary:
            sheet.save(temporary, "PNG")
    except VisarError as error:
        print(f"visar: error: {error}", file=sys.stderr)
        return 2
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
