"""Metrics of images by a named protocol, and moments of reference images to take them against."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import PIL
import torch
from torch import Tensor

from visar.errors import VisarError
from visar.eval.quality.clip_score import ImageAndText, clip_scores
from visar.eval.quality.extractors import Extractor, get_extractor
from visar.eval.quality.extractors.resize import PREPARE
from visar.eval.quality.image_folder import ImageFolder, has_images
from visar.eval.quality.metrics.frechet import (
    Moments,
    StoredMoments,
    frechet_distance,
    has_moments,
    load_moments,
    save_moments,
)
from visar.eval.quality.metrics.inception_score import inception_score
from visar.eval.quality.metrics.manifold import precision
from visar.eval.quality.metrics.mmd import cmmd, kid
from visar.eval.quality.protocols import COMPARING, Protocol, get_protocol
from visar.eval.quality.result import Result

Source = str | Path | ImageFolder

_NEEDS = {  # features of every image, where moments do not do
    "inception_score": "logits",
    "precision": "pool",
    "recall": "pool",
    "kid": "pool",
    "cmmd": "pool",
}


@dataclass
class _Measured:
    """What was taken of a set of images, by the name of the features: moments, and those of every image [n, D]."""

    moments: dict[str, Moments]
    features: dict[str, Tensor]


class _Reference:
    """Moments, images or both (as ADM's files hold them)."""

    def __init__(self, source: Source, protocol: Protocol) -> None:
        self.stored: StoredMoments | None = None
        self.images: ImageFolder | None = None
        if isinstance(source, ImageFolder):
            self.images = source
            return
        path = Path(source)
        if has_moments(path):
            self.stored = load_moments(path)
        if self.stored is None or has_images(path):
            self.images = ImageFolder.open(path, jpeg_allowed=True, mixed_allowed=protocol.pixels is None)

    def cannot(self, metric: Mapping[str, Any]) -> str:
        """Why this metric cannot be taken against it, or nothing."""
        if metric["kind"] == "frechet" and self.stored is not None:
            known = metric["features"] in self.stored.moments
            return "" if known else f"the reference has no moments of {metric['features']} features"
        return "the reference has moments and no images" if self.images is None else ""

    def must_fit(self, protocol: Protocol, extractor: Extractor) -> None:
        """Moments that say of which features they are must be of these."""
        own = {
            "extractor": extractor.name,
            "weights": extractor.weights,
            "resize": extractor.resize,
            "prepare": protocol.prepare,
        }
        provenance = self.stored.provenance if self.stored else {}
        for name, value in own.items():
            if provenance.get(name, value) != value:
                raise VisarError(
                    f"The reference's moments are of {name} {provenance[name]!r}, and here it is {value!r}."
                )


def measure(
    protocol: str | Protocol,
    folder: Source,
    reference: Source | None = None,
    *,
    device: torch.device | str = "cpu",
    batch: int = 32,
    seed: int = 0,
    weights: str | None = None,
    extractor: Extractor | None = None,
) -> Result:
    """Measure the images as the protocol says; every image is read once.

    `reference`: images, moments of `reference_stats`, or published mu and sigma; metrics that it cannot serve are
    left out and named. `seed` chooses KID's subsets. `weights`: a file of the extractor's. `extractor`: one that is
    loaded. Errors: too few images, another size or format, captions that are missing, features that are no numbers.
    """
    protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
    images = folder if isinstance(folder, ImageFolder) else ImageFolder.open(folder)
    size = _allowed(protocol, images)
    _enough(protocol, len(images), "Protocol")
    comparing = any(metric["kind"] in COMPARING for metric in protocol.metrics.values())
    if comparing and reference is None:
        raise VisarError(f"Protocol {protocol.label} needs a reference: {protocol.reference}")
    if not comparing and reference is not None:
        raise VisarError(f"Protocol {protocol.label} compares with nothing, and a reference was given.")
    against = None if reference is None else _Reference(reference, protocol)
    left_out = {
        name: reason
        for name, metric in protocol.metrics.items()
        if against is not None and metric["kind"] in COMPARING and (reason := against.cannot(metric))
    }
    metrics = {name: metric for name, metric in protocol.metrics.items() if name not in left_out}
    if not metrics:
        raise VisarError(f"The reference serves no metric of {protocol.label}: {next(iter(left_out.values()))}.")
    if any(metric["kind"] == "clip_score" for metric in metrics.values()):
        images.require_captions(f"Protocol {protocol.label}")
    extract = _extractor(protocol, extractor, device, weights)

    other, hashes = _Measured({}, {}), {}
    if against is not None:
        against.must_fit(protocol, extract)
        asked = [m for m in metrics.values() if m["kind"] in COMPARING]
        if against.stored is not None:
            hashes["moments"] = against.stored.fingerprint
            asked = [m for m in asked if m["kind"] != "frechet"]
        if asked and against.images is not None:
            _enough(protocol, len(against.images), "The reference of protocol")
            hashes["images"] = against.images.fingerprint()
            other = _look(against.images, extract, protocol, asked, batch)
        if against.stored is not None:
            other.moments.update(against.stored.moments)
    own = _look(images, extract, protocol, list(metrics.values()), batch)

    values: dict[str, float] = {}
    spread: dict[str, tuple[float, float]] = {}
    for name, metric in metrics.items():
        if metric["kind"] == "clip_score":
            found = clip_scores(
                images,
                cast(ImageAndText, extract),
                prefix=metric["prefix"],
                scale=metric["scale"],
                prepare=PREPARE[protocol.prepare],
                batch=batch,
            ).mean
            values[name], spread[name] = found.mean, (found.low, found.high)
        elif metric["kind"] == "kid":
            mean, std = kid(
                own.features["pool"], other.features["pool"], metric["subsets"], metric["subset_size"], seed
            )
            values[name], spread[name] = mean, (mean - std, mean + std)
        else:
            values[name] = _value(metric, own, other, device)
    return Result(
        protocol.label, values, spread, left_out, len(images), extract.name, extract.weights, extract.resize,
        protocol.prepare, size, images.format, images.fingerprint(), hashes, _versions(extract), seed,
    )  # fmt: skip


def reference_stats(
    protocol: str | Protocol,
    sources: Source | Sequence[Source],
    out: str | Path,
    *,
    device: torch.device | str = "cpu",
    batch: int = 32,
    weights: str | None = None,
    extractor: Extractor | None = None,
) -> StoredMoments:
    """Moments of reference images, and an .npz of them that says of which images and features they are.

    Several sources are parts of one reference: images, or files of this function, so that parts may be made apart.
    """
    protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
    asked = [metric for metric in protocol.metrics.values() if metric["kind"] == "frechet"]
    if not asked:
        raise VisarError(f"Protocol {protocol.label} has no Frechet distance, so no moments: give it the images.")
    parts = [_Reference(part, protocol) for part in ([sources] if isinstance(sources, Source) else sources)]
    extract = _extractor(protocol, extractor, device, weights)
    total = {metric["features"]: Moments() for metric in asked}
    images: list[str] = []
    for part in parts:
        if part.stored is not None:
            part.must_fit(protocol, extract)
            images += part.stored.provenance.get("images", [])
            found = part.stored.moments
        else:
            assert part.images is not None
            images.append(part.images.fingerprint())
            found = _look(part.images, extract, protocol, asked, batch).moments
        if missing := sorted(set(total) - set(found)):
            raise VisarError(f"A part of the reference has no moments of {missing[0]} features.")
        for name, moments in total.items():
            moments.merge(found[name])
    if len(set(images)) < len(images):
        raise VisarError("The same images are in two parts of the reference.")
    _enough(protocol, min(moments.n or 0 for moments in total.values()), "The reference of protocol")
    provenance = {
        "protocol": protocol.label, "extractor": extract.name, "weights": extract.weights, "resize": extract.resize,
        "prepare": protocol.prepare, "images": images, "versions": _versions(extract),
    }  # fmt: skip
    save_moments(out, total, provenance)
    return StoredMoments(total, provenance)


def _look(
    images: ImageFolder, extract: Extractor, protocol: Protocol, metrics: list[dict[str, Any]], batch: int
) -> _Measured:
    """Run the images through the extractor once, and take what the metrics need."""
    moments = {metric["features"]: Moments() for metric in metrics if metric["kind"] == "frechet"}
    collected: dict[str, list[Tensor]] = {_NEEDS[m["kind"]]: [] for m in metrics if m["kind"] in _NEEDS}
    if not moments and not collected:
        return _Measured({}, {})
    for found in extract.each(map(PREPARE[protocol.prepare], images.batches(size=batch))):
        for name in {*moments, *collected}:
            if not bool(found[name].isfinite().all()):
                raise VisarError(f"Images of {images.path} have {extract.name} features that are NaN or infinite.")
        for name, of in moments.items():
            of.add(found[name])
        for name, features in collected.items():
            features.append(found[name])
    return _Measured(moments, {name: torch.cat(features) for name, features in collected.items()})


def _value(metric: Mapping[str, Any], own: _Measured, other: _Measured, device: torch.device | str) -> float:
    """A metric that is one number. Distances between all images are taken on a GPU where there is one."""
    if metric["kind"] == "frechet":
        return frechet_distance(own.moments[metric["features"]], other.moments[metric["features"]])
    if metric["kind"] == "inception_score":
        return inception_score(own.features["logits"], metric["split"])
    where = device if torch.device(device).type == "cuda" else "cpu"  # others lack float64
    x, y = own.features["pool"].to(where), other.features["pool"].to(where)
    if metric["kind"] == "cmmd":
        return cmmd(x, y)
    # recall is precision with the sets changed over
    return (
        precision(x, y, metric["neighbours"])
        if metric["kind"] == "precision"
        else precision(y, x, metric["neighbours"])
    )


def _versions(extract: Extractor) -> dict[str, str]:
    return {"torch": torch.__version__, "pillow": PIL.__version__, **extract.versions}


def _extractor(
    protocol: Protocol, extractor: Extractor | None, device: torch.device | str, weights: str | None
) -> Extractor:
    if extractor is None:
        return get_extractor(protocol.extractor, device, weights)
    if extractor.name != protocol.extractor:
        raise VisarError(f"Protocol {protocol.label} is of {protocol.extractor} features, not of {extractor.name}.")
    return extractor


def _allowed(protocol: Protocol, images: ImageFolder) -> tuple[int, int]:
    """The size of the measured images, which must be one, in formats and of the pixels that the protocol allows."""
    if wrong := sorted(set(images.format.split("+")) - set(protocol.formats)):
        allowed = ", ".join(protocol.formats)
        raise VisarError(f"Protocol {protocol.label} measures {allowed} files, and {images.path} has {wrong[0]}.")
    if images.size is None:
        raise VisarError(f"Protocol {protocol.label} measures images of one size; those of {images.path} differ.")
    if protocol.pixels is not None and images.size != (protocol.pixels, protocol.pixels):
        height, width = images.size
        raise VisarError(
            f"Protocol {protocol.label} measures images of {protocol.pixels}x{protocol.pixels} pixels, not "
            f"{width}x{height}; resize a decoder's output before it is rounded to 8 bits."
        )
    return images.size


def _enough(protocol: Protocol, n: int, who: str) -> None:
    if n < protocol.least:
        raise VisarError(f"{who} {protocol.label} needs {protocol.least} or more images, and there are {n}.")
    if n < protocol.warn_below:
        warnings.warn(
            f"{who} {protocol.label} has {n} of the {protocol.wanted} images wanted: metrics of under "
            f"{protocol.warn_below} are biased or uncertain, and compare with those of equal counts only.",
            stacklevel=3,
        )
