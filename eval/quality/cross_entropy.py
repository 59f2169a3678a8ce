"""What rounding weights does to a model: the change of its cross-entropy, image by image, and of its tokens.

`python -m visar.eval.quality.cross_entropy --data images --styles 3d,noto,flat` gives the tokens of real images to the
model (teacher forcing) in float32, and again in bfloat16, with int8 and with float8 weights. The same images are
given to all, so that the error of a change is that of paired differences, far below that of either mean. Without
`--data` the images are the model's own, generated in float32 for the prompts or classes given. Weights of any kind are
measured on any device; what a device decodes with is another matter.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visar.engine.quantization import quantize
from visar.errors import VisarError
from visar.families.llamagen.gpt import LlamaGen
from visar.generation.model import ImageModel
from visar.params import DISCRETE
from visar.samplers import default_sampler
from visar.training.ar import encode_captions, tokenize
from visar.training.data import SPLITS, ImageSet, spread


@dataclass(frozen=True)
class Variant:
    """How a model is stored: its dtype, the weights of its layers, and whether its output head is rounded with them."""

    dtype: torch.dtype = torch.float32
    weights: str = "native"
    head: bool = False

    def of(self, gpt: LlamaGen) -> LlamaGen:
        """A copy of `gpt` like that; it is rounded from float32, and converted afterwards."""
        made = copy.deepcopy(gpt).float()
        if self.weights != "native":
            quantize(made, self.weights, head=self.head)
        torch.nn.Module.to(made, self.dtype)
        return made


VARIANTS: dict[str, Variant] = {
    "bfloat16": Variant(torch.bfloat16),
    "int8": Variant(weights="int8"),
    "int8, bfloat16": Variant(torch.bfloat16, "int8"),
    "int8, head too": Variant(weights="int8", head=True),
    "fp8": Variant(weights="fp8"),
}


@dataclass(frozen=True)
class Sample:
    """Images as tokens [n, N] with their conditions: class ids [n], or features [n, T, C] and mask [n, T]."""

    condition: Tensor
    mask: Tensor | None
    tokens: Tensor


@dataclass(frozen=True)
class Change:
    """Nats per token: `cross_entropy` of the variant, its `change` from float32 and the standard error of that."""

    images: int
    cross_entropy: float
    change: float
    error: float


@torch.inference_mode()
def nats(gpt: LlamaGen, sample: Sample, batch: int = 32) -> Tensor:
    """Cross-entropy of each image, nats per token, [n] float64."""
    out = []
    for start in range(0, len(sample.tokens), batch):
        part = slice(start, start + batch)
        tokens = sample.tokens[part].to(gpt.device)
        mask = None if sample.mask is None else sample.mask[part].to(gpt.device)
        logits = gpt(sample.condition[part].to(gpt.device), tokens[:, :-1], mask)
        each = F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")
        out.append(each.double().mean(1).cpu())
    return torch.cat(out)


def change(before: Tensor, after: Tensor) -> Change:
    """The paired difference of two runs over the same images, [n] each; n is 2 or more."""
    difference = after - before
    error = difference.std().item() / len(difference) ** 0.5
    return Change(len(after), after.mean().item(), difference.mean().item(), error)


def plain(model: ImageModel) -> str:
    """The name of plain decoding."""
    return "ar" if model.family.scan != "diagonal" else default_sampler(model.family.tokens, model.family.scan)


def agreement(model: ImageModel, gpt: LlamaGen, conditions: Sequence[Any], seed: int) -> dict[str, float]:
    """Plain decoding with `gpt` instead of the model's own, under one seed: how alike the tokens are.

    `equal` is the share of tokens that are the same, `until` the mean number before the first that is not.
    """
    known = model.family.model
    tokens = [model.generate(conditions, sampler=plain(model), seed=seed, output_type="tokens").tokens]
    try:
        model.family.replace("gpt", gpt)
        tokens.append(model.generate(conditions, sampler=plain(model), seed=seed, output_type="tokens").tokens)
    finally:
        model.family.replace("gpt", known)
    same = (tokens[0] == tokens[1]).double()
    return {"images": len(same), "equal": same.mean().item(), "until": same.cumprod(1).sum(1).mean().item()}


def real(model: ImageModel, data: ImageSet, most: int) -> dict[str, Sample]:
    """Up to `most` images of each split of an image set, by split. Raises `VisarError` for a class model."""
    if model.family.condition != "prompt":
        raise VisarError("Images with captions are for text models; leave --data out and give --class.")
    out = {}
    pixels = data.pixels(model.family.pixels[0])
    for split in SPLITS:
        rows = spread(data.indices(split), most)
        if len(rows) > 1:
            parts = model.family.components
            features, mask = encode_captions(parts["text_encoder"], [data.records[i] for i in rows], None)
            out[split] = Sample(features, mask, tokenize(parts["vq"], pixels[rows]))
    return out


def own(model: ImageModel, conditions: Sequence[Any], each: int, seed: int) -> Sample:
    """`each` images of every prompt or class, generated by the model itself as it is used."""
    tokens = [
        model.generate([c], num_images=each, seed=seed, output_type="tokens", sampler=plain(model)).tokens
        for c in conditions
    ]
    encoded = [part.repeat_interleave(each, 0) for part in model.family.encode(conditions)]
    return Sample(encoded[0], encoded[1] if len(encoded) > 1 else None, torch.cat(tokens).cpu())


def measure(
    model: ImageModel,
    samples: Mapping[str, Sample],
    conditions: Sequence[Any],
    variants: Mapping[str, Variant] = VARIANTS,
    seed: int = 0,
) -> dict[str, Any]:
    """Per variant: the bytes of the GPT, a `Change` for each sample, and the `agreement` over `conditions`."""
    before = {name: nats(model.family.model, sample) for name, sample in samples.items()}
    out: dict[str, Any] = {
        "float32": {
            "bytes": _bytes(model.family.model),
            "samples": {name: {"images": len(x), "cross_entropy": x.mean().item()} for name, x in before.items()},
        }
    }
    for label, variant in variants.items():
        gpt = variant.of(model.family.model)
        out[label] = {
            "bytes": _bytes(gpt),
            "samples": {name: asdict(change(before[name], nats(gpt, sample))) for name, sample in samples.items()},
            "tokens": agreement(model, gpt, conditions, seed),
        }
    return out


def _bytes(gpt: LlamaGen) -> int:
    return sum(t.numel() * t.element_size() for t in [*gpt.parameters(), *gpt.buffers()])


def table(report: Mapping[str, Any]) -> str:
    """The report as lines of text."""
    lines = []
    for label, row in report.items():
        lines.append(f"{label}: {row['bytes'] / 1e6:.2f} MB")
        for name, s in row["samples"].items():
            text = f"  {name} ({s['images']}): {s['cross_entropy']:.4f} nats per token"
            lines.append(text + (f", {s['change']:+.5f} +- {s['error']:.5f}" if "change" in s else ""))
        if "tokens" in row:
            t = row["tokens"]
            lines.append(
                f"  tokens under one seed: {100 * t['equal']:.1f}% equal, the first {t['until']:.0f} on average"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", default="icons")
    options.add_argument("--data", help="an image set; default: the model's own images")
    options.add_argument("--styles", default="")
    options.add_argument("--without-groups", default="")
    options.add_argument("--images", type=int, default=400, help="of each split, or of each prompt (default: 400)")
    options.add_argument("--prompt", action="append", default=[], help="repeatable; default: a few that icons knows")
    options.add_argument("--class", dest="classes", type=int, action="append", default=[], help="repeatable")
    options.add_argument("--weights", default=";".join(VARIANTS), help='separated by ";"; default: all')
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--device", default="cpu")
    options.add_argument("--json", action="store_true")
    given = options.parse_args(arguments)
    try:
        wanted = [label.strip() for label in given.weights.split(";")]
        if unknown := [label for label in wanted if label not in VARIANTS]:
            raise VisarError(f"There are no weights {unknown[0]!r}; there are {'; '.join(VARIANTS)}.")
        if given.images < 2:
            raise VisarError(f"--images must be 2 or more, not {given.images}.")
        model = ImageModel.load(given.model).to(given.device, torch.float32)
        if model.family.tokens != DISCRETE:
            raise VisarError("Cross-entropy is of a GPT over image tokens; a MAR has none.")
        model.bar = {"disable": True}
        conditions = given.classes or given.prompt or ["a red heart, 3d", "a lion, noto", "a green apple, flat"]
        if given.data:
            styles, without = (tuple(filter(None, x.split(","))) for x in (given.styles, given.without_groups))
            samples = real(model, ImageSet(given.data, styles, without), given.images)
        else:
            samples = {"own": own(model, conditions, given.images, given.seed)}
        report = measure(model, samples, conditions, {label: VARIANTS[label] for label in wanted}, given.seed)
    except VisarError as error:
        print(f"visar: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2) if given.json else table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
