"""How far a model with two-way heads is from the model that it was made of.

`python -m visar.eval.quality.two_way --model my-two-way --trunk my-model --data images` gives both the tokens of the
same images (teacher forcing). Each position has two distributions: the trunk's given the tokens before in raster order,
and the two-way model's given the diagonals before. The table shows the cross-entropy of both in nats per token, with a
standard error of the difference. And it shows what speculation would have of it, from the guided distributions p of the
trunk and q of the two-way model at the trunk's settings: the overlap 1 - TV, which bounds the rate at which a draft
from q is accepted, and p(d) for a draft d from q, the rate at which the trunk accepts the tokens of a finished image of
the two-way model. Without `--data` the images are the trunk's own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from visar.engine.guidance import Guidance
from visar.errors import VisarError
from visar.eval.quality.cross_entropy import Sample, change, nats, own, real
from visar.families.llamagen.gpt import LlamaGen
from visar.generation.discrete import guidance_of, target_of
from visar.generation.model import ImageModel
from visar.samplers import Target
from visar.training.data import ImageSet


@dataclass(frozen=True)
class Distance:
    """Means over the tokens of `images`; see the module."""

    images: int
    trunk: float
    two_way: float
    error: float
    overlap: float
    accepted: float


@torch.inference_mode()
def probs(gpt: LlamaGen, sample: Sample, target: Target, guidance: Guidance) -> Tensor:
    """The guided target distributions [B, N, V] of images, each position given what the model conditions on."""
    tokens, embed = sample.tokens[:, :-1], gpt.cls_embedding
    cond, uncond = (gpt(x, tokens, sample.mask) for x in (sample.condition, embed.null_like(sample.condition)))
    at = torch.arange(sample.tokens.shape[1]).expand(len(tokens), -1)
    return target.probs(guidance.combine(cond, uncond, at) if guidance.active else cond, at)


def distance(two_way: ImageModel, trunk: ImageModel, sample: Sample, batch: int = 16) -> Distance:
    """The distance on the images of a sample."""
    params = trunk.params_of()
    target, guidance = target_of(trunk.family, params), guidance_of(params)  # type: ignore[arg-type]
    overlap, accepted = [], []
    for start in range(0, len(sample.tokens), batch):
        rows = slice(start, start + batch)
        mask = None if sample.mask is None else sample.mask[rows]
        part = Sample(sample.condition[rows], mask, sample.tokens[rows])
        p, q = (probs(m.family.model, part, target, guidance) for m in (trunk, two_way))
        overlap.append(torch.minimum(p, q).sum(-1).mean(1))
        accepted.append((p * q).sum(-1).mean(1))
    before, after = (nats(m.family.model, sample) for m in (trunk, two_way))
    moved = change(before, after)
    return Distance(
        len(sample.tokens), float(before.mean()), moved.cross_entropy, moved.error, float(torch.cat(overlap).mean()),
        float(torch.cat(accepted).mean()),
    )  # fmt: skip


def check(two_way: ImageModel, trunk: ImageModel) -> None:
    """Raise `VisarError` unless one has two-way heads and the other none, and both have the same tokens."""
    for model, kind in ((two_way, "diagonal"), (trunk, "raster")):
        if not isinstance(model.family.model, LlamaGen) or model.family.scan != kind:
            heads = "two-way heads" if kind == "diagonal" else "none, as --trunk"
            raise VisarError(f"This compares a LlamaGen with {heads}, and another model was given.")
    one, other = (m.family.model.config for m in (two_way, trunk))
    for name in ("vocab_size", "condition", "condition_length"):
        if one[name] != other[name]:
            raise VisarError(f"The models have {name} {one[name]} and {other[name]}; they must be of one tokenizer.")
    if two_way.family.layout != trunk.family.layout:
        raise VisarError("The models make images of different sizes.")


def table(found: Mapping[str, Distance]) -> str:
    """The distances as lines of text."""
    return "\n".join(
        f"{name} ({d.images} images): trunk {d.trunk:.3f} nats per token, two-way {d.two_way:.3f} "
        f"({d.two_way - d.trunk:+.3f} +- {d.error:.3f}); overlap {d.overlap:.3f}, a finished draft's token accepted at "
        f"{d.accepted:.3f}"
        for name, d in found.items()
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", required=True, help="the model with two-way heads")
    options.add_argument("--trunk", default="icons", help="the model that it was made of (default: icons)")
    options.add_argument("--data", help="an image set; default: the trunk's own images")
    options.add_argument("--styles", default="")
    options.add_argument("--without-groups", default="")
    options.add_argument("--images", type=int, default=48, help="of each split, or of each prompt (default: 48)")
    options.add_argument("--prompt", action="append", default=[], help="repeatable; default: a few that icons knows")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--json", action="store_true")
    given = options.parse_args(arguments)
    try:
        if given.images < 2:
            raise VisarError(f"--images must be 2 or more, not {given.images}.")
        two_way, trunk = (ImageModel.load(name).to(dtype=torch.float32) for name in (given.model, given.trunk))
        check(two_way, trunk)
        trunk.bar = {"disable": True}
        if given.data:
            styles, without = (tuple(filter(None, x.split(","))) for x in (given.styles, given.without_groups))
            samples = real(trunk, ImageSet(given.data, styles, without), given.images)
        else:
            prompts = given.prompt or ["a red heart, 3d", "a lion, noto", "a green apple, flat"]
            samples = {"own": own(trunk, prompts, given.images, given.seed)}
        found = {name: distance(two_way, trunk, sample) for name, sample in samples.items()}
    except VisarError as error:
        print(f"visar: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({n: asdict(d) for n, d in found.items()}, indent=2) if given.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
