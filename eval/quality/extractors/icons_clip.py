"""Features of `icons-clip`, the small CLIP that is shipped: whether an image follows its prompt, with no download.

It knows drawings of the styles and words it was trained on and nothing else, so its scores are reported under its own
name and compare with those of no published CLIP (Radford et al. 2021, arXiv:2103.00020).
`python -m visar.eval.quality.extractors.icons_clip --data images` prints the metrics of its card.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visar.errors import VisarError
from visar.eval.quality.extractors.base import Extractor, frozen, weights_hash
from visar.training.clip import CaptionWords, image_features, load_clip, retrieval, text_features
from visar.training.data import SPLITS, ImageSet, Record

NAME = "icons-clip"
_AT_ONCE = 64


class IconsClip(Extractor):
    """ "pool" [B, D]: image features of length 1. `texts` gives those of captions, so their product is the cosine."""

    name = NAME

    def __init__(self, model: Any, words: CaptionWords, device: torch.device | str, versions: dict[str, str]) -> None:
        self.size = int(model.visual.image_size[0])
        self.resize = f"{self.size} px, sides apart, bicubic, antialiased, rounded (torch)"
        self.model = frozen(model, device)
        self.words, self.device, self.versions = words, device, versions
        self.weights = weights_hash(model)

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        parts = [self._resized(part.to(self.device)) for part in images.split(_AT_ONCE)]
        return {"pool": torch.cat([image_features(self.model, part) for part in parts])}

    def _resized(self, images: Tensor) -> Tensor:
        """uint8 images of the model's size; those that have it stay as they are."""
        if images.shape[2:] == (self.size, self.size):
            return images
        x = F.interpolate(images.float(), size=(self.size, self.size), mode="bicubic", antialias=True)
        return x.round().clamp(0, 255).to(torch.uint8)

    def texts(self, captions: Sequence[str]) -> Tensor:
        """Text features [B, D] of length 1, float32 on the CPU; of a caption of too many words the first count.

        Raises `VisarError` for a caption of which no word is known, since its score would say nothing.
        """
        for caption in captions:
            if not self.words.knows(caption):
                raise VisarError(f"No word of the caption {caption!r} is known to {NAME}; it knows names of drawings.")
        return text_features(self.model, self.words(captions))

    def scores(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosines [B] of uint8 images [B, 3, H, W] with their captions, in [-1, 1]."""
        if len(images) != len(captions):
            raise VisarError(f"{len(images)} images have {len(captions)} captions; give one for each.")
        return (self(images)["pool"] * self.texts(captions)).sum(1)


def icons_clip(device: torch.device | str = "cpu", weights: str | Path | None = None) -> IconsClip:
    """The shipped model, or the one in the folder `weights`, such as `clip` of a run of `visar train clip`."""
    folder = Path(str(resources.files("visar.assets"))) / NAME if weights is None else Path(weights)
    if not folder.is_dir():
        raise VisarError(f"There is no folder {folder} with a CLIP of `visar train clip`.")
    model, words = load_clip(folder)
    import open_clip

    return IconsClip(model, words, device, {"open_clip": open_clip.__version__})


def metrics(clip: IconsClip, data: ImageSet, most: int = 1024, seed: int = 0) -> dict[str, dict[str, float]]:
    """Per split: retrieval among the captions of the split and among all, and right captions against wrong ones.

    `higher` is how often the right caption scores above the wrong one, which is another concept's in the same style,
    of the same image; `auc` the same over any two images, as with one threshold.
    """
    rng, out = random.Random(seed), {}
    pixels = data.pixels(clip.size)
    for split in SPLITS:
        rows = data.indices(split)
        captions = [data.records[i].caption for i in rows]
        rows = rows if len(rows) <= most else sorted(rng.sample(rows, most))
        if len(set(captions)) < 2:
            continue
        records = [data.records[i] for i in rows]
        near = retrieval(clip.model, clip.words, pixels[rows], records, captions)
        of_all = retrieval(clip.model, clip.words, pixels[rows], records, [r.caption for r in data.records])
        right, wrong = pair_scores(clip, pixels[rows], records, captions, rng)
        values = {
            "images": len(rows),
            "captions": len(set(captions)),
            **near,
            **{f"{name}_of_all": share for name, share in of_all.items()},
            "right": right.mean().item(),
            "wrong": wrong.mean().item(),
            "higher": (right > wrong).double().mean().item(),
            "auc": (right[:, None] > wrong).double().mean().item(),
            "spread": right.std().item(),
        }
        out[split] = {name: round(value, 4) for name, value in values.items()}
    return out


def pair_scores(
    clip: IconsClip, pixels: Tensor, records: Sequence[Record], captions: Sequence[str], rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Cosines [n] of images with their own prompts, and with another one of `captions` in the same style."""
    names = list(dict.fromkeys(captions))
    wrong = []
    for r in records:
        while (other := rng.choice(names)) == r.caption:
            pass
        wrong.append(Record("", other, r.style).prompt())
    return clip.scores(pixels, [r.prompt() for r in records]), clip.scores(pixels, wrong)


def main() -> int:
    options = argparse.ArgumentParser(description="The metrics of the card of icons-clip.")
    options.add_argument("--data", required=True, help="folder or zip of captioned images")
    options.add_argument("--model", help="folder of `visar train clip` (default: the shipped model)")
    given = options.parse_args()
    try:
        print(json.dumps(metrics(icons_clip(weights=given.model), ImageSet(given.data)), indent=2))
    except VisarError as error:
        print(f"visar: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
