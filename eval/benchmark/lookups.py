"""What lookups and neighbours know about the next token: drafts that cost nothing, on a model's own images.

Run as `python -m visar.eval.benchmark.lookups`. It samples images by `ar`, reads the target distributions of all their
tokens, and prints two tables: the tokens per pass of drafts that are looked up in earlier tokens, and the acceptance
rate 1 - TV of drafts that are sampled from a distribution known before the pass. Drafts that are looked up are a
function of the past, so they are accepted as often as they are the token that `ar` sampled.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from visar.errors import VisarError
from visar.eval.prompts import conditions
from visar.families.base import DiscreteFamily
from visar.generation.discrete import guidance_of, target_of
from visar.generation.model import ImageModel
from visar.generation.sessions import Call
from visar.params import DISCRETE, SamplingParams
from visar.samplers import SpeculativeJacobi
from visar.tables import table

LONGEST = 8  # tokens of a match
DRAFTS = 10  # tokens that follow a match
CHILDREN, DEPTH = 8, 5  # of the tree of Token Recycling


@torch.inference_mode()
def target_probs(model: ImageModel, condition: Any, tokens: Tensor, params: SamplingParams, window: int = 64) -> Tensor:
    """The target distributions [N, V] of an image's tokens [N], each given those before it."""
    family, method = cast(DiscreteFamily, model.family), SpeculativeJacobi(window=window)
    target = target_of(family, params)
    session = Call(family, None, family.encode([condition]), method, target, guidance_of(params)).session()
    target = target.on(session.device, session.length, session.vocab)
    before = torch.cat([tokens[:1], tokens[:-1]]).to(session.device)
    out = []
    for part in before.split(window):
        at = session.positions(len(part))
        out.append(target.probs(session.forward(part[None]), at)[0].cpu())
        session.commit(torch.full_like(session.lengths, len(part)))
    return torch.cat(out)


def suffix_lookup(images: Iterable[list[int]], known: Iterable[list[int]], least: int) -> float:
    """Tokens per pass of drafts that followed the longest match of the last `least` or more tokens, most recently.

    Matches are sought in the image itself and in all before it, as by a suffix automaton.
    """
    text: list[int] = []
    places: dict[tuple[int, ...], int] = {}

    def add(token: int) -> None:
        text.append(token)
        for size in range(least, min(LONGEST, len(text)) + 1):
            places[tuple(text[-size - 1 : -1])] = len(text) - 1  # where what came after it stands

    for image in known:
        for token in image:
            add(token)
    passes = tokens = 0
    for image in images:
        done = 0
        while done < len(image):
            own = image[max(0, done - LONGEST) : done]
            matches = (tuple(own[-size:]) for size in range(len(own), least - 1, -1))
            found = next((places[match] for match in matches if match in places), len(text))
            drafts = text[found : found + DRAFTS]
            accepted = _leading(drafts, image[done:])
            count = min(accepted + 1, len(image) - done)
            for token in image[done : done + count]:
                add(token)
            done, passes = done + count, passes + 1
        tokens += len(image)
    return tokens / passes


def recycled(images: Iterable[tuple[list[int], Tensor]], vocab: int) -> float:
    """Tokens per pass of Token Recycling (Luo et al. 2024, arXiv:2408.08696) with all 8**5 paths in the tree.

    `images`: tokens [N] and distributions [N, V]. The successors of a token are the most likely ones when it was last
    fed, kept from image to image.
    """
    after = torch.full((vocab, min(CHILDREN, vocab)), -1)
    passes = tokens = 0
    for image, p in images:
        best, done = p.topk(after.shape[1]).indices, 0
        while done < len(image):
            accepted = 0
            while done and accepted < DEPTH and done + accepted < len(image):
                if image[done + accepted] not in after[image[done + accepted - 1]].tolist():
                    break
                accepted += 1
            count = min(accepted + 1, len(image) - done)
            for n in range(max(done, 1), done + count):
                after[image[n - 1]] = best[n]
            done, passes = done + count, passes + 1
        tokens += len(image)
    return tokens / passes


def overlaps(images: list[tuple[Tensor, Tensor]], known: list[Tensor], stride: int) -> dict[str, float]:
    """1 - TV of the target with distributions that are known before a pass, over the tokens from the second row on.

    `images`: tokens [N] and distributions [N, V]; `known`: tokens that n-grams are counted on.
    """
    vocab = images[0][1].shape[1]
    single = torch.bincount(torch.cat(known), minlength=vocab).float() + 1e-3
    single /= single.sum()
    pairs = {name: single.repeat(vocab, 1) for name in ("left", "above")}  # one count of the unigram in each row
    for tokens in known:
        for name, back in (("left", 1), ("above", stride)):
            pairs[name].index_put_((tokens[:-back], tokens[back:]), torch.ones(()), accumulate=True)
    out: dict[str, list[Tensor]] = {}
    for tokens, p in images:
        at = torch.arange(stride, len(tokens))
        bigrams = {n: (c := t[tokens[at - b]]) / c.sum(1, keepdim=True) for n, t, b in
                   (("bigram, left", pairs["left"], 1), ("bigram, above", pairs["above"], stride))}  # fmt: skip
        left, above = p[at - 1], p[at - stride]
        for name, q in (
            ("uniform", torch.full_like(left, 1 / vocab)), *bigrams.items(), ("distribution of the cell left", left),
            ("distribution of the cell above", above), ("mean of the two", (left + above) / 2),
        ):  # fmt: skip
            out.setdefault(name, []).append(torch.minimum(p[at], q).sum(1))
    return {name: float(torch.cat(parts).mean()) for name, parts in out.items()}


def _leading(drafts: list[int], tokens: list[int]) -> int:
    """How many drafts are the tokens, before the first that is not."""
    both = list(zip(drafts, tokens, strict=False))
    return next((i for i, (draft, token) in enumerate(both) if draft != token), len(both))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="icons")
    parser.add_argument("--images", type=int, default=32, help="of which the second half is drafted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--top-k", type=int, help="of the target (default: the model's own)")
    options = parser.parse_args(argv)
    try:
        if options.images < 2:
            raise VisarError(
                f"--images must be 2 or more, not {options.images}: n-grams are counted on the first half."
            )
        model = ImageModel.load(options.model)
        if model.family.tokens != DISCRETE:
            raise VisarError("Lookups are for models of discrete tokens.")
        model.bar = {"disable": True}
        params = model.params_of(SamplingParams(seed=options.seed, top_k=options.top_k))
        rows = [*_sampled(model, options.images, params)]
    except VisarError as error:
        print(f"visar: error: {error}", file=sys.stderr)
        return 2
    half = options.images // 2
    early, late = [t for t, _ in rows[:half]], rows[half:]
    lists, before = [t.tolist() for t, _ in late], [t.tolist() for t in early]
    found: list[tuple[Any, ...]] = [
        (f"longest match of {m} or more", f"{suffix_lookup(lists, before, m):.2f}") for m in (1, 2, 5)
    ]
    speed = recycled([(t.tolist(), p) for t, p in late], late[0][1].shape[1])
    found.append((f"Token Recycling, {CHILDREN} children, depth {DEPTH}", f"{speed:.2f}"))
    print(table(("DRAFTS THAT ARE LOOKED UP", "TOKENS/PASS"), found))
    known = overlaps(late, early, model.family.layout.stride)
    print(table(("DRAFTS THAT ARE SAMPLED FROM", "ACCEPTED (1 - TV)"), [(n, f"{a:.3f}") for n, a in known.items()]))
    return 0


def _sampled(model: ImageModel, count: int, params: SamplingParams) -> Iterable[tuple[Tensor, Tensor]]:
    for i, condition in enumerate(conditions(model, count)):
        tokens = model.generate(condition, params, sampler="ar", first_image=i, output_type="tokens").tokens[0].cpu()
        yield tokens, target_probs(model, condition, tokens, params)


if __name__ == "__main__":
    sys.exit(main())
