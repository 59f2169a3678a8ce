"""How much the distribution of a model depends on the width of a pass: `python -m visar.eval.exactness.dtype`.

Images of plain decoding are fed again, in passes of one token and of a window, and the target distributions of each
position are compared. In fp32 they agree to rounding; in bfloat16 they do not, unless the invariant mode is on. The
table shows, for each of several pairs of passes:

- the total variation (TV) of a position, mean and largest, and the share of positions with another top-k support;
- the images of the first kind of pass that have probability 0 by the second;
- the TV of whole images with a standard error, as the mean of (1 - P2(x) / P1(x))+ over images x of the first.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visar.engine.guidance import Guidance
from visar.engine.session import Session
from visar.errors import VisarError
from visar.eval.prompts import conditions
from visar.files import replacing, writable_folder
from visar.generation.model import ImageModel
from visar.kernels.derived import steady_weights
from visar.kernels.invariant import invariant
from visar.samplers import Target
from visar.tables import table


@dataclass(frozen=True)
class Pass:
    """A kind of pass: its dtype, its width, and whether the invariant mode is on."""

    dtype: str
    window: int
    invariant: bool = False

    def __str__(self) -> str:
        return f"{self.dtype}{', invariant' if self.invariant else ''}, W {self.window}"


@dataclass(frozen=True)
class Difference:
    """Two kinds of passes over the same images; see the module."""

    one: Pass
    other: Pass
    top_k: int
    images: int
    equal: bool  # all logits, bit for bit
    tv_mean: float
    tv_max: float
    support: float
    impossible: int
    image_tv: float
    image_tv_error: float


@torch.inference_mode()
def forced_logits(session: Session, tokens: Tensor, window: int, kept: int | None = None) -> Tensor:
    """Guided logits [B, N, V] after each prefix of `tokens` [B, N], by passes of `window` tokens on a fresh session.

    Each pass commits `kept` tokens, by default all.
    """
    (batch, length), kept = tokens.shape, kept or window
    inputs = F.pad(tokens, (1, window)).to(session.device)  # the input of position n is token n - 1
    parts, at = [], 0
    while at < length:
        count = min(kept, length - at)
        parts.append(session.forward(inputs[:, at : at + window])[:, :count].clone())
        session.commit(torch.full((batch,), count, device=session.device))
        at += count
    return torch.cat(parts, dim=1)


def logits_by(of: Pass, model: ImageModel, conditions: Sequence[Any], tokens: Tensor, guidance_scale: float) -> Tensor:
    """`forced_logits` of images by a kind of pass, as `generate` computes them; changes the model's dtype."""
    model.to(dtype=getattr(torch, of.dtype))
    with invariant(of.invariant), steady_weights(), torch.inference_mode():  # other forms of products round otherwise
        encoded, guidance = model.family.encode(list(conditions)), Guidance(guidance_scale)
        session = model.family.session(encoded, window=of.window, guidance=guidance)  # type: ignore[attr-defined]
        return forced_logits(session, tokens, of.window).cpu()


def difference(one: Pass, other: Pass, logits: Sequence[Tensor], tokens: Tensor, target: Target) -> Difference:
    """Compare the logits [B, N, V] of two kinds of passes on `tokens` [B, N] that the first has sampled."""
    at = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    p, q = (target.probs(x, at) for x in logits)
    tv = (p - q).abs().sum(-1) / 2
    own = [x.double().gather(-1, tokens[..., None]).squeeze(-1).log().sum(1) for x in (p, q)]
    if not own[0].isfinite().all():  # they were not computed as the images were
        raise VisarError(f"Images have probability 0 by {one}, which has sampled them.")
    lost = (1 - (own[1] - own[0]).exp()).clamp_min(0)
    return Difference(
        one, other, target.top_k, len(tokens), torch.equal(*logits), float(tv.mean()), float(tv.max()),
        float(((p > 0) != (q > 0)).any(-1).double().mean()), int((own[1] == -torch.inf).sum()), float(lost.mean()),
        float(lost.std() / len(lost) ** 0.5),
    )  # fmt: skip


def measure(
    model: ImageModel,
    images: int = 12,
    window: int = 16,
    top_k: int = 10,
    guidance_scale: float = 3.0,
    report: Callable[[Difference], None] = lambda row: None,
) -> list[Difference]:
    """The table for a model on a CPU or GPU; changes the model's dtype."""
    half = Pass("bfloat16", 1), Pass("bfloat16", window)
    same = Pass("bfloat16", 1, True), Pass("bfloat16", window, True)
    full = Pass("float32", 1), Pass("float32", window)
    pairs = [(half, top_k), (half, 0), ((half[0], full[0]), top_k), (full, top_k), (same, top_k), (same, 0)]
    chosen, found = conditions(model, images), []
    model.bar = {"disable": True}
    known: dict[tuple[Pass, Pass, int], Tensor] = {}

    def sampled(by: Pass, top_k: int) -> Tensor:
        model.to(dtype=getattr(torch, by.dtype))
        settings: dict[str, Any] = {"guidance_scale": guidance_scale, "top_k": top_k, "invariant": by.invariant}
        return model.generate(chosen, sampler="ar", seed=0, output_type="tokens", **settings).tokens.cpu()

    def logits(of: Pass, by: Pass, top_k: int) -> Tensor:
        if (of, by, top_k) not in known:
            known[of, by, top_k] = logits_by(of, model, chosen, tokens[by, top_k], guidance_scale)
        return known[of, by, top_k]

    tokens: dict[tuple[Pass, int], Tensor] = {}
    for (one, other), k in pairs:
        if (one, k) not in tokens:
            tokens[one, k] = sampled(one, k)
        both = logits(one, one, k), logits(other, one, k)
        found.append(difference(one, other, both, tokens[one, k], Target(top_k=k)))
        report(found[-1])
    return found


def text(rows: Sequence[Difference]) -> str:
    """The table."""
    head = ("PASSES", "AGAINST", "TOP-K", "SAME BITS", "TV MEAN", "TV MAX", "OTHER SUPPORT", "IMPOSSIBLE", "IMAGE TV")
    lines = [
        (
            str(r.one), str(r.other), r.top_k or "-", "yes" if r.equal else "no", f"{r.tv_mean:.2g}",
            f"{r.tv_max:.2g}", f"{100 * r.support:.1f}%", f"{r.impossible} of {r.images}",
            f"{r.image_tv:.2g} +- {r.image_tv_error:.1g}",
        )
        for r in rows
    ]  # fmt: skip
    return table(head, lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="icons", help="a model of discrete tokens")
    parser.add_argument("--images", type=int, default=12, metavar="N")
    parser.add_argument("--window", type=int, default=16, metavar="W")
    parser.add_argument("--top-k", type=int, default=10, metavar="K")
    parser.add_argument("--guidance-scale", type=float, default=3.0, metavar="X")
    parser.add_argument("--json", metavar="PATH")
    options = parser.parse_args(arguments)
    try:
        if options.images < 2 or options.window < 2 or options.top_k < 1:
            raise VisarError("Give at least 2 images, a window of at least 2, and a top-k of at least 1.")
        if options.json:
            writable_folder(Path(options.json).parent)
        model = ImageModel.load(options.model)
        if model.family.tokens != "discrete":
            raise VisarError(f"{options.model} has continuous tokens, which have no pass of several tokens.")
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        rows = measure(model, options.images, options.window, options.top_k, options.guidance_scale)
    except VisarError as error:
        print(f"visar: error: {error}", file=sys.stderr)
        return 2
    print(text(rows))
    if options.json:
        with replacing(options.json) as temporary:
            temporary.write_text(json.dumps([asdict(r) for r in rows], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
