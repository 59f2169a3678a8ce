"""Did the faster sampler change the images? Two folders made from the same prompts, compared image by image.

It answers three questions: have the images the same distribution (all together, and prompt by prompt), do they follow
their prompts as well as before, and how many are equal. The effect of chance is shown next to it: by relabelling within
pairs, and by further folders of the first sampler under other seeds.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visar.errors import VisarError
from visar.eval.quality.clip_score import clip_scores
from visar.eval.quality.extractors import Extractor
from visar.eval.quality.extractors.resize import PREPARE
from visar.eval.quality.image_folder import ImageFolder
from visar.eval.quality.metrics.energy import PairedEnergy, paired_energy_test
from visar.eval.quality.protocols import Protocol

MOST = 4096  # pairs; all distances between them are held at once
LEVEL = 0.01  # how rarely seed noise alone may be called a change


@dataclass(frozen=True)
class Shift:
    """A metric of A and of B, and the mean difference B - A over pairs with its 95% interval."""

    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    `same`: the share of images that are equal in every pixel; `elsewhere`: of those of B, the share that A has of
    another prompt alone, as when ids were mixed up; `levels`: the mean difference of a pixel, of 255;
    `tokens`: the share of equal tokens where both folders have them. `overall` compares all images, `per_prompt`
    those of one prompt, where prompts have several. `seeds`: A against other seeds of its own. `reference`: energy
    distances of A and B to reference images. `clip`: scores against their prompts.
    """

    a: str
    b: str
    images: int
    prompts: int
    features: str
    weights: str
    same: float
    elsewhere: float
    levels: float
    tokens: float | None
    overall: PairedEnergy
    per_prompt: PairedEnergy | None
    seeds: tuple[PairedEnergy, ...]
    reference: Shift | None
    clip: Shift | None

    @property
    def found(self) -> dict[str, float]:
        """p of every test of B against A, times their number."""
        tests: dict[str, PairedEnergy | Shift | None] = {
            "the images as a whole": self.overall,
            "images of one prompt": self.per_prompt,
            "how well they follow their prompts": self.clip,
        }
        made = {name: test.p for name, test in tests.items() if test is not None}
        return {name: min(1.0, p * len(made)) for name, p in made.items()}

    @property
    def p(self) -> float:
        """The least of them."""
        return min(self.found.values())

    @property
    def changed(self) -> bool:
        """Whether B has another distribution than A; seed noise alone says so once in a hundred times."""
        return self.p < LEVEL

    @property
    def conclusion(self) -> str:
        """The result in one sentence."""
        t = self.overall
        if self.same == 1:
            return f"The same: all {self.images} images are equal in every pixel."
        if n := round(self.elsewhere * self.images):
            return f"Mixed up: {n} of {self.images} images are those of another prompt; pair them first."
        far = f"energy distance {t.distance:.3g}, {100 * max(t.share, 0):.2g}% of what it could be; p {self.p:.2g}"
        if self.changed:
            return f"Changed: {self.what} ({far})."
        return f"No change seen in {self.images} pairs ({far}; seen from {max(t.least, 0):.2g} on)."

    @property
    def what(self) -> str:
        """What changed, in words; "" if nothing is known to."""
        return ", ".join(name for name, p in self.found.items() if p < LEVEL)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"p": self.p, "changed": self.changed, "conclusion": self.conclusion}


class Remembering(Extractor):
    """An extractor that computes equal images once, as one folder is compared with many; `prepare` comes first."""

    def __init__(self, extract: Extractor, prepare: str = "none"):
        self.inner, self.name, self.weights, self.resize = extract, extract.name, extract.weights, extract.resize
        self.versions, self.prepare = extract.versions, PREPARE[prepare]
        self.known_features: dict[bytes, Tensor] = {}

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        keys = [_digest(image) for image in images]
        new = {key: i for i, key in enumerate(keys) if key not in self.known_features}
        if new:
            found = self.inner(self.prepare(images[list(new.values())]))["pool"]
            self.known_features.update(zip(new, found, strict=True))
        return {"pool": torch.stack([self.known_features[key] for key in keys])}


def scores_by(protocol: Protocol, extract: Any) -> Callable[[ImageFolder, Sequence[str]], Tensor]:
    """What `compare` takes as `clip`: scores by a protocol such as `clip-vit-b32`, and its extractor."""
    metric = next((m for m in protocol.metrics.values() if m["kind"] == "clip_score"), None)
    if metric is None:
        raise VisarError(f"Protocol {protocol.label} has no CLIP score.")
    known: dict[Path, dict[str, float]] = {}

    def scores(folder: ImageFolder, ids: Sequence[str]) -> Tensor:
        if folder.path not in known:
            known[folder.path] = clip_scores(
                folder, extract, prefix=metric["prefix"], scale=metric["scale"], prepare=PREPARE[protocol.prepare]
            ).scores
        return torch.tensor([known[folder.path][i] for i in ids], dtype=torch.float64)

    return scores


def features_of(folder: ImageFolder, ids: Sequence[str], extract: Extractor, batch: int = 32) -> Tensor:
    """Features [n, D] of the images of these ids, in their order; a `VisarError` for any that is not finite."""
    found = torch.cat([extract(part)["pool"].float().cpu() for part in folder.batches(ids, batch)])
    if not bool(found.isfinite().all()):
        bad = ids[int((~found.isfinite().all(1)).nonzero()[0])]
        raise VisarError(f"Features of image {bad} of {folder.path} are not finite.")
    return found


def paired_ids(a: ImageFolder, *others: ImageFolder) -> list[str]:
    """The ids of all folders, which must be the same ones, with the same prompts and of one size."""
    for b in others:
        for one, other in ((a, b), (b, a)):
            if missing := sorted(set(one.ids) - set(other.ids)):
                raise VisarError(
                    f"{other.path} lacks {len(missing)} images that {one.path} has, the first being {missing[0]}; "
                    "compare folders of the same ids."
                )
        for i in a.ids:
            if a.captions.get(i) != b.captions.get(i) and i in a.captions and i in b.captions:
                raise VisarError(
                    f"Image {i} is of {a.captions[i]!r} in {a.path} and of {b.captions[i]!r} in {b.path}; "
                    "compare folders made from the same prompts."
                )
        if a.size != b.size:
            raise VisarError(f"Images of {a.path} are of {a.size} pixels and those of {b.path} of {b.size}.")
    return list(a.ids)


def prompt_of(folder: ImageFolder, i: str) -> Hashable:
    """What an image was made from: a caption, a class, or no more than its own id."""
    return folder.captions.get(i, folder.records.get(i, {}).get("class", i))


def mean_shift(a: Tensor, b: Tensor) -> Shift:
    """Metrics [n] of the images of A and of B, in pairs, and their mean difference (a normal interval and test)."""
    gap = (b - a).double()
    mean, error = float(gap.mean()), float(gap.std() / math.sqrt(len(gap)))
    p = math.erfc(abs(mean) / error / math.sqrt(2)) if error else float(mean == 0)
    return Shift(float(a.double().mean()), float(b.double().mean()), mean, mean - 1.96 * error, mean + 1.96 * error, p)


def reference_shift(a: Tensor, b: Tensor, reference: Tensor, resamples: int = 999, seed: int = 0) -> Shift:
    """Energy distances of features A and B [n, D] to those of a reference [m, D]; pairs are resampled (bootstrap)."""
    a, b, reference = a.double(), b.double(), reference.double()
    n = len(a)
    own = float(torch.cdist(reference, reference).sum() / (len(reference) * (len(reference) - 1)))
    to_a, to_b = (2 * torch.cdist(x, reference).mean(1) for x in (a, b))
    in_a, in_b = torch.cdist(a, a), torch.cdist(b, b)
    g = torch.Generator().manual_seed(seed)
    counts = [torch.ones(n)] + [
        torch.bincount(torch.randint(n, (n,), generator=g), minlength=n).float() for _ in range(resamples)
    ]
    w = torch.stack(counts).double()

    def distance(to: Tensor, inside: Tensor) -> Tensor:
        # An image that is sampled twice is no pair of two.
        pairs = ((w @ inside) * w).sum(1) / (n * n - w.square().sum(1))
        return (w @ to) / n - pairs - own

    far_a, far_b = distance(to_a, in_a), distance(to_b, in_b)
    gap = far_b - far_a
    low, high = (float(gap[1:].quantile(q)) for q in (0.025, 0.975))
    p = 2 * float(torch.minimum((gap[1:] <= 0).double().mean(), (gap[1:] >= 0).double().mean()))
    return Shift(float(far_a[0]), float(far_b[0]), float(gap[0]), low, high, min(1.0, max(p, 1 / resamples)))


def _pixels(a: ImageFolder, b: ImageFolder, ids: Sequence[str]) -> tuple[float, float, float]:
    """`same`, `elsewhere` and `levels` of a `Comparison`."""
    own: dict[bytes, set[Hashable]] = {}
    moved: list[tuple[bytes, Hashable]] = []
    gaps = []
    prompts = iter([prompt_of(a, i) for i in ids])
    for one, other in zip(a.batches(ids), b.batches(ids), strict=True):
        gaps.append((one.int() - other.int()).abs().flatten(1).double().mean(1))
        for x, y in zip(one, other, strict=True):
            prompt = next(prompts)
            own.setdefault(_digest(x), set()).add(prompt)
            moved.append((_digest(y), prompt))
    gap = torch.cat(gaps)
    elsewhere = sum(image in own and prompt not in own[image] for image, prompt in moved)
    return float((gap == 0).double().mean()), elsewhere / len(ids), float(gap.mean())


def _digest(image: Tensor) -> bytes:
    return sha256(image.contiguous().numpy().tobytes()).digest()


def _tokens(a: ImageFolder, b: ImageFolder, ids: Sequence[str]) -> float | None:
    """The share of equal tokens; None if an image's tokens are not in both manifests."""
    equal = total = 0
    for i in ids:
        one, other = (folder.records.get(i, {}).get("tokens", []) for folder in (a, b))
        if not one or len(one) != len(other):
            return None
        equal += sum(s == t for s, t in zip(one, other, strict=True))
        total += len(one)
    return equal / total


def compare(
    a: ImageFolder,
    b: ImageFolder,
    extract: Extractor,
    *,
    seeds: Sequence[ImageFolder] = (),
    reference: ImageFolder | None = None,
    clip: Callable[[ImageFolder, Sequence[str]], Tensor] | None = None,
    relabellings: int = 1999,
    seed: int = 0,
) -> Comparison:
    """Compare folders `a` (plain decoding, say) and `b`, of the same ids and prompts.

    `seeds`: folders as `a` under other seeds; `reference`: images that no model made, of any ids; `clip`: gives the
    score [n] of the images of these ids, called with (folder, ids). Of more than 4,096 pairs, so many are chosen by
    `seed`. Raises `VisarError` for folders that do not belong together.
    """
    for i, folder in enumerate(seeds):
        if any(os.path.samefile(folder.path, other.path) for other in (a, b, *seeds[:i])):
            raise VisarError(f"{folder.path} is given twice; `seeds` are images like A's under other seeds.")
    ids = paired_ids(a, b, *seeds)
    if len(ids) < 2:
        raise VisarError(f"{a.path} holds {len(ids)} images; a comparison needs 2 or more.")
    if reference is not None and len(reference) < 2:
        raise VisarError(f"{reference.path} holds {len(reference)} images; a reference needs 2 or more.")
    if len(ids) > MOST:
        ids = sorted(random.Random(seed).sample(ids, MOST))
    prompts = [prompt_of(a, i) for i in ids]
    same, elsewhere, levels = _pixels(a, b, ids)
    features = features_of(a, ids, extract)
    others = features if same == 1 else features_of(b, ids, extract)
    several = len(set(prompts)) < len(prompts)
    level = LEVEL / (1 + several + (clip is not None))  # all tests together

    def test(x: Tensor, groups: Sequence[Hashable] | None = None) -> PairedEnergy:
        return paired_energy_test(features, x, groups, relabellings, seed, level)

    far = None
    if reference is not None:
        known = list(reference.ids)
        if len(known) > MOST:
            known = sorted(random.Random(seed).sample(known, MOST))
        far = reference_shift(features, others, features_of(reference, known, extract))
    return Comparison(
        a=str(a.path), b=str(b.path), images=len(ids), prompts=len(set(prompts)), features=extract.name,
        weights=extract.weights, same=same, elsewhere=elsewhere, levels=levels,
        tokens=_tokens(a, b, ids), overall=test(others), per_prompt=test(others, prompts) if several else None,
        seeds=tuple(test(features_of(s, ids, extract)) for s in seeds), reference=far,
        clip=None if clip is None else mean_shift(clip(a, ids), clip(b, ids)),
    )  # fmt: skip
