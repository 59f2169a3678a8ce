"""The metrics and contact sheets of a trained model's card.

`python -m visar.eval.report.model_card --data images --styles 3d,noto,flat --out FOLDER` measures reconstruction PSNR
and next-token cross-entropy (of a MAR the loss of its head) on the training set and on both hold-outs, next to a bigram
baseline, and generates prompts of each kind, chosen by a fixed seed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys

import torch
import torch.nn.functional as F

from visar.errors import VisarError
from visar.eval.report.prompt_sheet import drawings, prompt_sheet
from visar.files import replacing, writable_folder
from visar.generation.model import ImageModel
from visar.params import CONTINUOUS
from visar.training.ar import bigram_cross_entropy, cross_entropy, tokenize
from visar.training.autoencoder import psnr as latent_psnr
from visar.training.data import SPLITS, ImageSet, spread, to_unit
from visar.training.mar import LatentSamples, MARLoss, mean_loss
from visar.training.tokenizer import psnr

TITLES = {
    "train": "prompts of training images",
    "unseen-style": "known concept, image not in training",
    "unseen-concept": "concept not in training",
}


def masked_metrics(model: ImageModel, data: ImageSet, size: int, most: int = 256) -> dict[str, dict[str, float]]:
    """Per split: the number of images, PSNR in dB, and the head's loss with half to all of the tokens hidden."""
    pixels = data.pixels(size)
    parts = model.family.components
    samples = LatentSamples(parts["vae"], parts["text_encoder"], data, size)
    out = {}
    for split in SPLITS:
        rows = data.indices(split)
        if rows:
            some = spread(rows, most)
            out[split] = {
                "images": len(rows),
                "psnr_db": round(latent_psnr(parts["vae"], pixels[some]), 2),
                "loss": round(mean_loss(MARLoss(parts["mar"]), samples, some), 4),
            }
    return out


def metrics(model: ImageModel, data: ImageSet, size: int, most: int = 400) -> dict[str, dict[str, float]]:
    """Per split: the number of images, PSNR in dB, cross-entropy and that of a bigram in nats per token."""
    if model.family.tokens == CONTINUOUS:
        return masked_metrics(model, data, size)
    parts = model.family.components
    pixels = data.pixels(size)
    tokens = tokenize(parts["vq"], pixels)
    train = tokens[data.indices("train")]
    out = {}
    for split in SPLITS:
        rows = spread(data.indices(split), most)
        if not rows:
            continue
        out[split] = {
            "images": len(data.indices(split)),
            "psnr_db": round(psnr(parts["vq"], pixels[rows]), 2),
            "cross_entropy": round(
                cross_entropy(parts["gpt"], parts["text_encoder"], [data.records[i] for i in rows], tokens[rows]), 3
            ),
            "bigram_cross_entropy": round(
                bigram_cross_entropy(train, tokens[rows], parts["vq"].sizes.codebook_size), 3
            ),
        }
    return out


def recognition(model: ImageModel, data: ImageSet, size: int, count: int = 96, seed: int = 0) -> dict[str, float]:
    """How often the training image nearest to what a training prompt gives shows the concept that was asked for.

    Near is by the pixels in 16x16 cells. `chance` is what a training image taken at random would reach.
    `distance` is the mean one to the nearest, of a channel in [-1, 1], next to that of real images of concepts that
    were not in training: a model that copies is far below it.
    """

    def cells(unit: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(unit, 16).flatten(1)

    train = data.indices("train")
    records = [data.records[i] for i in train]
    known = cells(to_unit(data.pixels(size)[train]))
    rows = random.Random(seed).sample(range(len(train)), min(count, len(train)))
    first = among_five = chance = distance = 0.0
    for start in range(0, len(rows), 16):
        part = rows[start : start + 16]
        images = model.generate([records[i].prompt() for i in part], seed=seed, output_type="pt").images
        assert isinstance(images, torch.Tensor)
        far, near = torch.cdist(cells(images.cpu() * 2 - 1), known).topk(5, largest=False)
        distance += float(far[:, 0].sum())
        for row, nearest in zip(part, near.tolist(), strict=True):
            same = [records[i].concept == records[row].concept for i in nearest]
            first, among_five = first + same[0], among_five + any(same)
            chance += sum(r.concept == records[row].concept for r in records) / len(records)
    shares = {"nearest": first, "among_five_nearest": among_five, "chance": chance}
    apart = {"distance": distance / len(rows)}
    if unseen := data.indices("unseen-concept"):
        real = cells(to_unit(data.pixels(size)[unseen]))
        apart["distance_of_unseen"] = float(torch.cdist(real, known).amin(1).mean())
    measured = {name: round(n / len(rows), 3) for name, n in shares.items()}
    return {"prompts": len(rows), **measured, **{k: round(v / known.shape[1] ** 0.5, 3) for k, v in apart.items()}}


def chosen(data: ImageSet, split: str, count: int, seed: int) -> list[str]:
    """Prompts of different concepts of a split, chosen by a seed."""
    prompts = sorted({data.records[i].concept: data.records[i].prompt() for i in data.indices(split)}.values())
    return random.Random(seed).sample(prompts, min(count, len(prompts)))


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--data", required=True)
    options.add_argument("--model", default="icons")
    options.add_argument("--styles", default="")
    options.add_argument("--without-groups", default="")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", required=True)
    given = options.parse_args()
    try:
        folder = writable_folder(given.out)
        styles, without = (tuple(filter(None, x.split(","))) for x in (given.styles, given.without_groups))
        data = ImageSet(given.data, styles, without)
        model = ImageModel.load(given.model).to(dtype=torch.float32)
    except VisarError as error:
        print(f"visar: error: {error}", file=sys.stderr)
        return 2
    model.bar = {"disable": True}
    size = model.family.pixels[0]
    report = {**metrics(model, data, size), "recognition": recognition(model, data, size, seed=given.seed)}
    with replacing(folder / "metrics.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))
    for split, title in TITLES.items():
        prompts = chosen(data, split, 32 if split == "train" else 16, given.seed)
        if prompts:
            with replacing(folder / f"{split}.png") as temporary:
                images = [drawings(model, prompts[i : i + 16], 1, given.seed) for i in range(0, len(prompts), 16)]
                prompt_sheet(prompts, [one for part in images for one in part], columns=8).save(temporary)
            print(f"{folder / split}.png: {title}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
