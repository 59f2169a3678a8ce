"""CLIP score: the cosine between features of an image and of its caption (Hessel et al. 2021, arXiv:2104.08718).

Published scores differ in network, prefix, factor and resizing, which the protocol sets. Images and captions are
paired by id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from visar.errors import VisarError
from visar.eval.quality.image_folder import ImageFolder
from visar.eval.quality.metrics.interval import Interval, mean_interval


class ImageAndText(Protocol):
    """What `visar.eval.quality.extractors.clip.Clip` is to this file."""

    def each(self, batches: Iterable[Tensor]) -> Iterator[dict[str, Tensor]]: ...

    def texts(self, captions: list[str]) -> Tensor: ...


@dataclass(frozen=True)
class ClipScores:
    """The score of every image by id, their mean and its 95% interval, all times the protocol's factor."""

    scores: dict[str, float]
    mean: Interval


def clip_scores(
    folder: ImageFolder,
    extract: ImageAndText,
    *,
    prefix: str = "A photo depicts ",
    scale: float = 1.0,
    prepare: Callable[[Tensor], Tensor] = lambda images: images,
    batch: int = 32,
) -> ClipScores:
    """`scale` times the cosine of every image with `prefix` + its caption; `prepare` resizes images first.

    Negative cosines stay negative.
    """
    folder.require_captions("The CLIP score")
    scores: dict[str, float] = {}
    ids = list(folder.ids)
    for found in extract.each(map(prepare, folder.batches(size=batch))):
        features = found["pool"]
        part, ids = ids[: len(features)], ids[len(features) :]
        texts = extract.texts([prefix + folder.captions[name] for name in part])
        cosines = scale * torch.nn.functional.cosine_similarity(features.double(), texts.double(), dim=1)
        if not bool(cosines.isfinite().all()):
            raise VisarError(f"The CLIP score of {part[int((~cosines.isfinite()).nonzero()[0])]!r} is not a number.")
        scores |= dict(zip(part, cosines.tolist(), strict=True))
    return ClipScores(scores, mean_interval(torch.tensor(list(scores.values()), dtype=torch.float64)))
