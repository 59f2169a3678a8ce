"""Energy distances between images' features, and tests of whether two samples have one distribution.

The energy distance (Szekely and Rizzo 2013) is 2 E|x - y| - E|x - x'| - E|y - y'|: 0 where the distributions are the
same, and above 0 where they are not. Without its diagonal it has no bias, so it comes out below 0 as often as above.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from visar.errors import VisarError


def energy(x: Tensor, y: Tensor) -> Tensor:
    """The energy distance [...] between sets of features x [..., n, D] and y [..., m, D], n and m 2 or more."""

    def within(z: Tensor) -> Tensor:
        count = z.shape[-2]
        return torch.cdist(z, z).sum((-2, -1)) / (count * (count - 1))

    return 2 * torch.cdist(x, y).mean((-2, -1)) - within(x) - within(y)


class Energy(NamedTuple):
    """The energy distance of two samples, the share of permutations that give as much, and its z among them."""

    distance: float
    p: float
    z: float


def energy_test(x: Tensor, y: Tensor, permutations: int = 400, seed: int = 0) -> Energy:
    """Whether rows x [n, D] and y [m, D] have one distribution, by permutation; every pair is held at once."""
    if len(x) < 2 or len(y) < 2 or x.shape[1] != y.shape[1]:
        raise VisarError(f"The energy distance needs two samples of equal width, not {[*x.shape]} and {[*y.shape]}.")
    pooled = torch.cat([x, y]).float()
    distances = torch.cdist(pooled, pooled)
    weights = torch.cat([torch.full((len(x),), 1 / len(x)), torch.full((len(y),), -1 / len(y))])
    g = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(weights), generator=g) for _ in range(permutations)]
    shuffled = torch.stack([weights, *(weights[order] for order in orders)])
    found = -((shuffled @ distances) * shuffled).sum(1)
    own, others = found[0], found[1:]
    return Energy(
        float(own), float((1 + (others >= own).sum()) / (1 + permutations)), float((own - others.mean()) / others.std())
    )


@dataclass(frozen=True)
class PairedEnergy:
    """The distance between two samples whose rows come in pairs, and what relabelling within pairs makes of it.

    `distance`: the energy distance without bias; `share`: the same over twice the mean distance of an image to one of
    another pair, from 0 (one distribution) to 1 (nothing in common). `p`: the share of relabellings that give as much;
    `least`: the distance that the share `level` of them exceed, so the smallest that would have been found. `pairs`:
    how many.
    """

    distance: float
    share: float
    p: float
    least: float
    level: float
    pairs: int


def paired_energy_test(
    x: Tensor,
    y: Tensor,
    groups: Sequence[Hashable] | None = None,
    relabellings: int = 1999,
    seed: int = 0,
    level: float = 0.01,
) -> PairedEnergy:
    """Whether x [n, D] and y [n, D], row i of both made for one prompt, have the same distributions.

    With `groups`, of n labels, only images of one group are compared with one another: so it is the mean over prompts
    of the distance within a prompt, which also shows images that have the wrong prompt.

    The two images of a pair may be swapped at random if nothing has changed; they need not be independent of one
    another, nor pairs of one distribution (a Rademacher bootstrap of a degenerate U-statistic; Dehling and Mikosch
    1994). Two images of a pair that are the same say nothing, so runs under one seed are compared most sharply.
    """
    if x.shape != y.shape or x.ndim != 2 or len(x) < 2:
        raise VisarError(f"Pairs need two samples of one shape and 2 or more rows, not {[*x.shape]} and {[*y.shape]}.")
    x, y = x.double(), y.double()  # distances by matrix products, which cancel
    cross = torch.cdist(x, y)
    # [n, n], how much pairs i and j say that the samples differ if none is relabelled
    says = cross + cross.T - torch.cdist(x, x) - torch.cdist(y, y)
    compared = torch.ones_like(says, dtype=torch.bool).fill_diagonal_(False)
    if groups is not None:
        codes = torch.unique(torch.tensor([hash(g) for g in groups]), return_inverse=True)[1]
        compared &= codes[:, None] == codes
    count = int(compared.sum())
    if not count:
        raise VisarError("No prompt has 2 or more images, so images of one prompt cannot be compared.")
    says = torch.where(compared, says, 0.0) / count
    signs = torch.randint(2, (relabellings, len(x)), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    others = ((signs @ says) * signs).sum(1)
    own = says.sum()
    apart = 2 * float(cross[compared].mean())
    # Equal up to rounding is as much: where all pairs are the same, every relabelling gives 0.
    p = float((1 + (others >= own - 1e-12 * apart).sum()) / (1 + relabellings))
    share, least = float(own) / apart if apart else 0.0, float(others.quantile(1 - level))
    return PairedEnergy(float(own), share, p, least, level, len(x))
