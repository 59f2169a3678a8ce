"""Inception score, precision and recall, KID, CMMD and intervals against their definitions and torch-fidelity."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from visar.errors import VisarError
from visar.eval.quality.metrics.inception_score import inception_score
from visar.eval.quality.metrics.interval import mean_interval
from visar.eval.quality.metrics.manifold import precision
from visar.eval.quality.metrics.mmd import cmmd, kid


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_inception_score_of_its_extremes() -> None:
    assert inception_score(torch.zeros(10, 7)) == pytest.approx(1)  # nothing is recognised
    assert inception_score(torch.eye(7).repeat(3, 1) * 1000) == pytest.approx(7)  # everything is, in equal shares


def test_inception_score_is_the_mean_over_splits_in_order() -> None:
    logits = normal(25, 6) * 2
    p = logits.softmax(1).numpy()
    expected = [np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in (p[:10], p[10:20], p[20:])]
    assert inception_score(logits, 10) == pytest.approx(np.mean(expected), rel=1e-12)
    assert inception_score(logits.flip(0), 10) != pytest.approx(np.mean(expected), rel=1e-3)


def test_inception_score_against_torch_fidelity() -> None:
    isc = pytest.importorskip("torch_fidelity.metric_isc")
    logits = normal(60, 9) * 2
    expected = isc.isc_features_to_metric(logits, splits=3, shuffle=False)["inception_score_mean"]
    assert inception_score(logits, 20) == pytest.approx(expected, rel=1e-10)


def test_precision_by_hand() -> None:
    """On a line with k = 3: the radii of 0, 1, 2, 3, 10 are 3, 2, 2, 3 and 9, so the manifold reaches from -3 to 19."""
    reference = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0]])
    images = torch.tensor([[-3.0], [-3.1], [18.9], [19.1]])
    assert precision(images, reference) == 0.5
    assert precision(reference, reference) == 1


def test_precision_by_hand_with_another_k() -> None:
    reference = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0]])
    inside = torch.tensor([[-2.0], [5.0], [2.0], [18.0]])
    outside = torch.tensor([[-2.1], [18.1]])
    assert precision(inside, reference, k=2) == 1 and precision(outside, reference, k=2) == 0


def test_precision_and_recall_against_torch_fidelity() -> None:
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    x, y = normal(700, 5) * 0.6, normal(600, 5, seed=1)
    expected = prc.prc_features_to_metric(x, y, verbose=False)
    assert precision(x, y) == pytest.approx(expected["precision"], rel=1e-6)
    assert precision(y, x) == pytest.approx(expected["recall"], rel=1e-6)
    assert expected["precision"] - expected["recall"] > 0.2


def test_kid_against_torch_fidelity() -> None:
    metric = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = normal(90, 12).float(), normal(80, 12, seed=1).float() * 1.3 + 0.2
    expected = metric.kid_features_to_metric(x, y, kid_subsets=7, kid_subset_size=50, rng_seed=5, verbose=False)
    found = kid(x, y, 7, 50, seed=5)
    assert found.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)
    assert found.std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-5)


def test_kid_has_no_bias() -> None:
    """Of two samples of one distribution it is 0 on average; an image paired with itself would add about 3 E k / n."""
    found = [kid(normal(20, 3, seed=2 * i), normal(20, 3, seed=2 * i + 1), 1, 20).mean for i in range(400)]
    assert abs(np.mean(found)) < 4 * np.std(found) / 20
    assert min(found) < 0


def test_cmmd_is_that_of_its_definition() -> None:
    x, y = (torch.nn.functional.normalize(z, dim=1) for z in (normal(7, 4), normal(5, 4, seed=1) + 1))

    def mean(a: Tensor, b: Tensor) -> float:
        return float(np.mean([math.exp(-float((u - v).square().sum()) / 200) for u in a for v in b]))

    assert cmmd(x, y) == pytest.approx(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)), rel=1e-9)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)


def test_cmmd_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(30, 4), normal(21, 4, seed=1)
    whole = cmmd(x, y)
    monkeypatch.setattr("visar.eval.quality.metrics.mmd._ROWS", 8)
    assert cmmd(x, y) == pytest.approx(whole, rel=1e-10)


def test_precision_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(50, 3), normal(40, 3, seed=1)
    whole = precision(x, y)
    monkeypatch.setattr("visar.eval.quality.metrics.manifold._ROWS", 7)
    assert precision(x, y) == whole and 0 < whole < 1


def test_intervals_cover_as_often_as_they_say() -> None:
    for resamples, trials in ((0, 2000), (300, 200)):
        held = sum(
            low <= 2 <= high
            for _, low, high in (mean_interval(normal(60, seed=i) * 3 + 2, 0.9, resamples) for i in range(trials))
        )
        assert abs(held / trials - 0.89) < 4 * (0.9 * 0.1 / trials) ** 0.5


def test_interval_by_hand() -> None:
    mean, low, high = mean_interval(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    half = 1.959964 * (5 / 3) ** 0.5 / 2
    assert (mean, low, high) == pytest.approx((2.5, 2.5 - half, 2.5 + half), rel=1e-6)


def test_bad_input() -> None:
    x = normal(5, 3)
    for call, message in (
        (lambda: kid(x, x, 1, 6), "subsets of 6 need as many images on both sides, and there are 5 and 5"),
        (lambda: kid(x, x[:, :2], 1, 2), "are compared"),
        (lambda: cmmd(x, x[:0]), "are compared"),
        (lambda: precision(x, x[:3]), "more than 3 images"),
        (lambda: precision(x, x[:, :2]), "Precision compares"),
        (lambda: inception_score(x[:1]), "2 or more images"),
        (lambda: mean_interval(x[0, :1]), "2 or more scores"),
        (lambda: mean_interval(x[0], 1.0), "between 0 and 1"),
    ):
        with pytest.raises(VisarError, match=message):
            call()
