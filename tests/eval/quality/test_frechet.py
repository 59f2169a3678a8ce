"""The Frechet distance against closed forms and another implementation, and moments however they are taken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from visar.errors import VisarError
from visar.eval.quality.metrics.frechet import Moments, frechet_distance, load_moments, save_moments


def gaussian(mu: list[float], sigma: list[list[float]]) -> Moments:
    return Moments.published(torch.tensor(mu, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_in_one_dimension() -> None:
    assert frechet_distance(gaussian([1.0], [[4.0]]), gaussian([-2.0], [[9.0]])) == pytest.approx(9 + (2 - 3) ** 2)


@pytest.mark.parametrize("width, ranks", [(5, (5, 5)), (5, (4, 3)), (60, (60, 7)), (60, (20, 30)), (60, (1, 1))])
def test_of_covariances_that_commute(width: int, ranks: tuple[int, int]) -> None:
    """Of equal eigenvectors it is a sum over eigenvalues; those beyond a rank are 0, which rounding makes +-1e-16."""
    for seed in range(8):
        turn, _ = torch.linalg.qr(normal(width, width, seed=seed))
        a, b = (normal(width, seed=seed + i).exp().where(torch.arange(width) < rank, 0) for i, rank in enumerate(ranks))
        b = b.flip(0) if seed % 2 else b  # the null space of one is where the other has its image
        one, two = (Moments.published(torch.zeros(width).double(), turn @ x.diag() @ turn.T) for x in (a, b))
        expected = float((a.sqrt() - b.sqrt()).square().sum())
        assert frechet_distance(one, two) == pytest.approx(expected, abs=1e-12 * float(a.sum() + b.sum())), seed


@pytest.mark.parametrize("counts", [(20, 30), (30, 500), (500, 20), (2, 2)])
def test_of_fewer_images_than_features(counts: tuple[int, int]) -> None:
    """The centred features are factors of the covariances: their nuclear norm needs no eigenvalues."""
    x, y = (normal(n, 100, seed=n + i) * torch.linspace(0.01, 3, 100) + i for i, n in enumerate(counts))
    (f, g) = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    traces = float(f.square().sum() + g.square().sum())
    expected = float((x.mean(0) - y.mean(0)).square().sum()) + traces - 2 * float(torch.linalg.svdvals(f @ g.T).sum())
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(expected, abs=1e-12 * traces)


def test_in_two_dimensions() -> None:
    """tr M^(1/2) = (tr M + 2 det(M)^(1/2))^(1/2) for a 2x2 matrix M with non-negative eigenvalues."""
    a, b = np.array([[2.0, 0.6], [0.6, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
    root = (np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b))) ** 0.5
    expected = 0.5**2 + 1.5**2 + np.trace(a) + np.trace(b) - 2 * root
    found = frechet_distance(gaussian([0.5, 0.0], a.tolist()), gaussian([0.0, 1.5], b.tolist()))
    assert found == pytest.approx(expected, rel=1e-12)


def test_against_torch_fidelity() -> None:
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = normal(300, 40), normal(500, 40, seed=1) @ normal(40, 40, seed=2) / 6 + 0.1
    statistics = [fid.fid_features_to_statistics(z) for z in (x, y)]
    expected = fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(expected, rel=1e-9)


def test_of_itself_and_of_a_shift() -> None:
    """Of equal rank-deficient covariances it is 0 to rounding, where roots of products are off by more."""
    x = normal(20, 100)
    assert abs(frechet_distance(Moments.of(x), Moments.of(x))) < 1e-10
    assert frechet_distance(Moments.of(x), Moments.of(x + 2)) == pytest.approx(400, rel=1e-12)


def test_moments_are_those_of_numpy() -> None:
    x = normal(37, 6) * 3 + 1000  # far from 0, where sums of squares would lose digits
    found = Moments.of(x.float())
    rounded = x.float().double().numpy()
    assert found.n == 37
    assert np.allclose(found.mu.numpy(), rounded.mean(0), rtol=1e-14)
    assert np.allclose(found.sigma.numpy(), np.cov(rounded, rowvar=False), rtol=1e-10)


@pytest.mark.parametrize("sizes", [(1,) * 37, (10, 0, 26, 1), (37,)])
def test_batches_do_not_matter(sizes: tuple[int, ...]) -> None:
    x, whole = normal(37, 6) + 100, Moments()
    for part in x.split(list(sizes)):
        whole.add(part)
    assert torch.allclose(whole.mu, x.mean(0), rtol=1e-13)
    assert torch.allclose(whole.sigma, torch.cov(x.T), rtol=1e-11)


def test_order_and_merging_do_not_matter() -> None:
    x = normal(50, 6) + 100
    whole, parts, empty = Moments.of(x.flip(0)), Moments.of(x[:13]), Moments()
    parts.merge(Moments.of(x[13:]))
    parts.merge(Moments())
    empty.merge(parts)
    assert parts.n == empty.n == 50
    for found in (parts, empty):
        assert torch.allclose(found.sigma, whole.sigma, rtol=1e-11) and torch.allclose(found.mu, whole.mu, rtol=1e-13)
    empty.add(x)
    assert parts.n == 50 and torch.allclose(parts.sigma, whole.sigma, rtol=1e-11)


def test_files(tmp_path: Path) -> None:
    x = normal(30, 4)
    Moments.of(x).save(tmp_path / "a.npz", {"of": "noise"})
    stored = load_moments(tmp_path / "a.npz")
    assert stored.provenance == {"of": "noise"} and stored.moments["pool"].n == 30
    again = Moments.load(tmp_path / "a.npz")
    again.add(normal(5, 4, seed=1))
    assert torch.allclose(again.sigma, torch.cov(torch.cat([x, normal(5, 4, seed=1)]).T), rtol=1e-12)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as data:
        assert np.allclose(data["sigma"], np.cov(x.numpy(), rowvar=False)) and int(data["n"]) == 30
        assert json.loads(str(data["provenance"])) == {"of": "noise"}
    assert [f.name for f in tmp_path.iterdir()] == ["a.npz"]


def test_published_files(tmp_path: Path) -> None:
    """With mu and sigma only, or with ADM's spatial ones beside them; the fingerprint is of the numbers."""
    x, y = Moments.of(normal(30, 4)), Moments.of(normal(30, 3))
    numbers = {"mu": x.mu.numpy(), "sigma": x.sigma.numpy()}
    np.savez(tmp_path / "plain.npz", **numbers)
    np.savez(tmp_path / "adm.npz", arr_0=np.zeros((1, 2, 2, 3), np.uint8), mu_s=y.mu.numpy(), sigma_s=y.sigma.numpy(),
             **numbers)  # fmt: skip
    plain, adm = load_moments(tmp_path / "plain.npz"), load_moments(tmp_path / "adm.npz")
    assert set(plain.moments) == {"pool"} and set(adm.moments) == {"pool", "spatial"}
    assert plain.moments["pool"].n is None and plain.moments["pool"].width == 4
    assert frechet_distance(plain.moments["pool"], x) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(adm.moments["spatial"], y) == pytest.approx(0, abs=1e-12)
    with pytest.raises(VisarError, match="unknown number of images cannot be merged"):
        plain.moments["pool"].add(normal(3, 4))
    save_moments(tmp_path / "again.npz", plain.moments, {"told": 1})
    assert load_moments(tmp_path / "again.npz").fingerprint == plain.fingerprint != adm.fingerprint


def test_bad_input(tmp_path: Path) -> None:
    x = normal(5, 3)
    with pytest.raises(VisarError, match="1 of 5 images have features that are NaN"):
        Moments.of(x.index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(float("nan")).double()))
    with pytest.raises(VisarError, match=r"must be \[n, D\], not \[5\]"):
        Moments.of(x[:, 0])
    with pytest.raises(VisarError, match="different widths cannot be compared: 3 and 2"):
        frechet_distance(Moments.of(x), Moments.of(x[:, :2]))
    with pytest.raises(VisarError, match="different widths"):
        Moments.of(x).merge(Moments.of(x[:, :2]))
    with pytest.raises(VisarError, match="needs 2 or more images, not 1"):
        frechet_distance(Moments.of(x[:1]), Moments.of(x))
    with pytest.raises(VisarError, match="no features"):
        frechet_distance(Moments(), Moments.of(x))
    with pytest.raises(VisarError, match="negative eigenvalues"):
        frechet_distance(gaussian([0, 0], [[1, 2], [2, 1]]), gaussian([0, 0], [[1, 0], [0, 1]]))
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    np.savez(tmp_path / "nan.npz", mu=np.zeros(1), sigma=np.full((1, 1), np.nan))
    for name, message in (
        ("none.npz", "holds no moments"),
        ("other.npz", "holds no moments"),
        ("odd.npz", "do not fit"),
        ("nan.npz", "NaN or infinite"),
    ):
        with pytest.raises(VisarError, match=message):
            load_moments(tmp_path / name)
