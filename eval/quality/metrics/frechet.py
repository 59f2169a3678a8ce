"""The Frechet distance of two Gaussians fitted to features, and their moments in one pass.

FID is this distance over Inception features (Heusel et al. 2017, arXiv:1706.08500). The trace term is a nuclear norm,
tr (A B)^(1/2) = || A^(1/2) B^(1/2) ||_*, from two symmetric eigendecompositions and singular values: nothing here takes
the root of a matrix that is not symmetric. Eigenvalues that are 0 up to rounding count as 0, so covariances of fewer
images than features are as accurate as others: to about 1e-12 of tr A + tr B.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visar.errors import VisarError
from visar.eval.quality.arrays import names_in, numbers, text
from visar.files import replacing
from visar.reading import parse_json

_SUFFIX = {"pool": "", "spatial": "_s"}  # of `mu` and `sigma` in a file, as in ADM's reference batches


class Moments:
    """Count n, mean [D] and scatter [D, D] (the sum of outer products around the mean) of features, in float64.

    `n` is None for published moments that do not say of how many images they are; nothing can be added to those.
    """

    def __init__(self, mu: Tensor | None = None, scatter: Tensor | None = None, n: int | None = 0) -> None:
        self._mu, self._scatter, self.n = mu, scatter, n

    @staticmethod
    def of(features: Tensor) -> Moments:
        """Moments of features [n, D]."""
        out = Moments()
        out.add(features)
        return out

    @staticmethod
    def published(mu: Tensor, sigma: Tensor) -> Moments:
        """Moments that are known, of an unknown number of images."""
        return Moments(mu, sigma, None)

    @property
    def width(self) -> int:
        """D; 0 before anything was added."""
        return 0 if self._mu is None else len(self._mu)

    @property
    def mu(self) -> Tensor:
        """The mean [D]."""
        if self._mu is None:
            raise VisarError("There are no features to take moments of.")
        return self._mu

    @property
    def sigma(self) -> Tensor:
        """The covariance [D, D] without bias (n - 1), as in every published FID."""
        assert self.mu is not None and self._scatter is not None
        if self.n is None:
            return self._scatter
        if self.n < 2:
            raise VisarError(f"A covariance needs 2 or more images, not {self.n}.")
        return self._scatter / (self.n - 1)

    def add(self, features: Tensor) -> None:
        """Take in features [B, D]."""
        if features.ndim != 2:
            raise VisarError(f"Features must be [n, D], not {[*features.shape]}.")
        if not len(features):
            return
        x = features.double().cpu()
        if not bool(x.isfinite().all()):
            bad = int((~x.isfinite()).any(1).sum())
            raise VisarError(f"{bad} of {len(x)} images have features that are NaN or infinite.")
        mu = x.mean(0)
        x = x - mu
        self.merge(Moments(mu, x.T @ x, len(x)))

    def merge(self, other: Moments) -> None:
        """Add the samples of other moments (Chan, Golub and LeVeque 1983)."""
        if self.n is None or other.n is None:
            raise VisarError("Moments of an unknown number of images cannot be merged.")
        if not other.n:
            return
        if self._mu is None or self._scatter is None:
            self._mu, self._scatter, self.n = other.mu, _known(other), other.n
            return
        _same_width(self, other)
        total = self.n + other.n
        step = other.mu - self._mu
        self._scatter = self._scatter + _known(other) + torch.outer(step, step) * (self.n * other.n / total)
        self._mu = self._mu + step * (other.n / total)
        self.n = total

    def save(self, path: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
        """Write mu, sigma, n and what they are of, as an .npz."""
        save_moments(path, {"pool": self}, provenance or {})

    @staticmethod
    def load(path: str | Path) -> Moments:
        """Read `mu`, `sigma` and, where it is there, `n`."""
        return load_moments(path).moments["pool"]


def _known(moments: Moments) -> Tensor:
    assert moments._scatter is not None
    return moments._scatter


def _same_width(a: Moments, b: Moments) -> None:
    if a.width != b.width:
        raise VisarError(f"Features of different widths cannot be compared: {a.width} and {b.width}.")


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), in float64; 0 or more up to 1e-12 (tr A + tr B)."""
    mu_a, mu_b = a.mu, b.mu
    _same_width(a, b)
    sigma_a, sigma_b = a.sigma, b.sigma
    root = torch.linalg.svdvals(_factor(sigma_a).T @ _factor(sigma_b)).sum()
    return float((mu_a - mu_b).square().sum() + sigma_a.trace() + sigma_b.trace() - 2 * root)


def _factor(sigma: Tensor) -> Tensor:
    """F [D, D] with F F^T = sigma, which must be a covariance up to rounding.

    An eigenvalue of 0 comes out as anything within D eps of the largest, of either sign, and its root would be large:
    those are set to 0.
    """
    values, vectors = torch.linalg.eigh((sigma + sigma.T) / 2)
    if bool(values[0] < -1e-5 * values[-1].abs()):
        raise VisarError("This is no covariance: it has negative eigenvalues.")
    zero = len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors * values.where(values > zero, 0).sqrt()


@dataclass(frozen=True)
class StoredMoments:
    """Moments by the name of their features ("pool", "spatial"), what they are of, and a sha256 (hex) of them."""

    moments: dict[str, Moments]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        total = hashlib.sha256()
        for name, found in sorted(self.moments.items()):
            total.update(name.encode() + found.mu.numpy().tobytes() + found.sigma.numpy().tobytes())
        return total.hexdigest()


def save_moments(path: str | Path, moments: Mapping[str, Moments], provenance: Mapping[str, Any]) -> None:
    """Write moments by the name of their features with the keys of ADM's files: mu, sigma, mu_s, sigma_s; and n."""
    arrays: dict[str, Any] = {"provenance": np.array(json.dumps(dict(provenance), sort_keys=True))}
    for name, found in moments.items():
        suffix = _SUFFIX[name]
        arrays |= {f"mu{suffix}": found.mu.numpy(), f"sigma{suffix}": found.sigma.numpy()}
        if found.n is not None:
            arrays["n"] = np.array(found.n)
    with replacing(Path(path).with_suffix(".npz")) as temporary:
        np.savez(temporary, **arrays)


def has_moments(path: str | Path) -> bool:
    """Whether this is an .npz with `mu` and `sigma`."""
    return {"mu", "sigma"} <= names_in(path)


def load_moments(path: str | Path) -> StoredMoments:
    """Moments of an .npz: of `save_moments`, or published ones with `mu`, `sigma` (and perhaps `mu_s`, `sigma_s`)."""
    if not has_moments(path):
        raise VisarError(f"{path} holds no moments: an .npz with `mu` and `sigma` does.")
    path, count = Path(path), None
    found: dict[str, Moments] = {}
    provenance: dict[str, Any] = {}
    has = names_in(path)
    if "n" in has:
        n = numbers(path, "n")
        if n.shape or n != round(float(n)) or not 2 <= n < 2**53:
            raise VisarError(f"`n` of {path} must be the number of images, 2 or more.")
        count = int(n)
    if "provenance" in has:
        provenance = parse_json(text(path, "provenance"), dict[str, Any], f"Cannot read `provenance` of {path}")
    for name, suffix in _SUFFIX.items():
        if f"mu{suffix}" not in has or f"sigma{suffix}" not in has:
            continue
        mu, sigma = (torch.from_numpy(numbers(path, f"{key}{suffix}")) for key in ("mu", "sigma"))
        if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)):
            raise VisarError(f"`mu` and `sigma` of {path} do not fit: {[*mu.shape]} and {[*sigma.shape]}.")
        if not bool(mu.isfinite().all() and sigma.isfinite().all()):
            raise VisarError(f"`mu` or `sigma` of {path} is NaN or infinite.")
        found[name] = Moments(mu, sigma if count is None else sigma * (count - 1), count)
    return StoredMoments(found, provenance)
