"""The features that need no download."""

from __future__ import annotations

import pytest
import torch

from visar.eval.quality.extractors import as_uint8
from visar.eval.quality.extractors.lite0 import lite0


def test_lite0() -> None:
    extract = lite0()
    ramp = torch.linspace(0, 1, 48).expand(3, 48, 48)
    images = as_uint8(torch.stack([ramp, ramp.transpose(1, 2), torch.full_like(ramp, 0.5)]))
    found = extract(images)["pool"]
    assert found.shape == (3, 1280) and bool((found >= 0).all())
    assert torch.allclose(extract(images[1:2])["pool"], found[1:2], atol=1e-4)
    assert found[0, :4].tolist() == pytest.approx([0.0, 0.0, 3.3110, 0.0], abs=2e-3)  # as the package itself gives
