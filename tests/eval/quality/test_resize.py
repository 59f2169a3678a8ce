"""Each resizing against its definition, written out once more in loops, and against Pillow and torch-fidelity."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from visar.eval.quality.extractors.resize import (
    PREPARE,
    center_crop,
    network_input,
    pil_bicubic,
    tf1_bilinear,
    torch_bilinear,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def tf1_by_hand(image: Tensor, size: int) -> Tensor:
    """One channel [H, W] pixel by pixel, from the description of TensorFlow 1's kernel."""
    old_height, old_width = image.shape
    out = torch.empty(size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            y, x = i * old_height / size, j * old_width / size
            y0, x0 = math.floor(y), math.floor(x)
            y1, x1 = min(y0 + 1, old_height - 1), min(x0 + 1, old_width - 1)
            corners = [float(image[a, b]) for a in (y0, y1) for b in (x0, x1)]
            above = corners[0] + (corners[1] - corners[0]) * (x - x0)
            below = corners[2] + (corners[3] - corners[2]) * (x - x0)
            out[i, j] = above + (below - above) * (y - y0)
    return out


@pytest.mark.parametrize("shape, size", [((8, 8), 13), ((9, 14), 5), ((6, 6), 6), ((2, 3), 7)])
def test_tf1_is_that_of_its_description(shape: tuple[int, int], size: int) -> None:
    images = noise(2, 3, *shape)
    found = tf1_bilinear(images, size)
    assert found.shape == (2, 3, size, size) and found.dtype == torch.float32
    assert torch.allclose(found[1, 2].double(), tf1_by_hand(images[1, 2], size), atol=1e-4)


@pytest.mark.parametrize("side", [32, 64, 256, 299, 480])
def test_tf1_is_torch_fidelitys_bit_for_bit(side: int) -> None:
    module = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    images = noise(1, 3, side, side + 5)
    expected = module.interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
    assert torch.equal(tf1_bilinear(images, 299), expected)


def test_tf1_differs_from_torchs() -> None:
    """A shift of half a pixel: on a ramp of slope 8 that is enlarged twofold, 8 * 1/4 = 2 levels."""
    ramp = (torch.arange(16) * 8).to(torch.uint8).expand(1, 3, 16, 16)
    difference = tf1_bilinear(ramp, 32) - torch_bilinear(ramp, 32)
    assert (difference[..., 2:28] - 2).abs().max() < 1e-4


def test_torch_bilinear_is_pytorch_fids() -> None:
    images = noise(2, 3, 20, 31)
    expected = torch.nn.functional.interpolate(images / 255, size=(13, 13), mode="bilinear", align_corners=False)
    assert torch.allclose(torch_bilinear(images, 13), expected * 255, atol=1e-4)


def cubic(x: float) -> float:
    """Keys' kernel with a = -0.5, Pillow's."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def cubic_by_hand(row: np.ndarray, size: int) -> np.ndarray:
    """One row, antialiased: the kernel is as wide as the step where it shrinks."""
    step = len(row) / size
    wide = max(step, 1.0)
    out = np.empty(size)
    for i in range(size):
        centre = (i + 0.5) * step
        near = range(max(0, int(centre - 2 * wide + 0.5)), min(len(row), int(centre + 2 * wide + 0.5)))
        weights = np.array([cubic((j + 0.5 - centre) / wide) for j in near])
        out[i] = (weights * row[list(near)]).sum() / weights.sum()
    return out


@pytest.mark.parametrize("old, size", [(12, 20), (30, 11), (16, 16)])
def test_bicubic_is_that_of_its_kernel(old: int, size: int) -> None:
    images = noise(1, 3, old, old)
    rows = np.stack([cubic_by_hand(row, size) for row in images[0, 1].double().numpy()])
    expected = np.stack([cubic_by_hand(column, size) for column in rows.T], 1)
    found = pil_bicubic(images, size)
    assert np.abs(found[0, 1].numpy() - expected).max() < 2e-3
    assert found.dtype == torch.float32


def test_bicubic_overshoots_unless_clipped() -> None:
    edge = torch.cat([torch.zeros(1, 3, 16, 8), torch.full((1, 3, 16, 8), 255.0)], 3).to(torch.uint8)
    clean = pil_bicubic(edge, 40)
    assert clean.min() < -5 and clean.max() > 260
    assert torch.equal(pil_bicubic(edge, 40, clip=True), clean.clamp(0, 255))


def test_bicubic_is_cleanfids_channel_by_channel() -> None:
    images = noise(2, 3, 17, 23)
    for b in range(2):
        for c in range(3):
            plane = Image.fromarray(images[b, c].numpy().astype(np.float32))
            expected = np.asarray(plane.resize((29, 29), Image.Resampling.BICUBIC))
            assert np.array_equal(pil_bicubic(images, 29)[b, c].numpy(), expected)


@pytest.mark.parametrize("shape", [(7, 10), (10, 7), (9, 9), (5, 8), (6, 9)])
def test_center_crop_is_torchvisions(shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    images = noise(1, 3, *shape)
    assert torch.equal(center_crop(images), functional.center_crop(images, min(shape)))


def test_lanczos_is_llamagens() -> None:
    images = noise(2, 3, 300, 420)
    for image, found in zip(images, PREPARE["center-lanczos-256"](images), strict=True):
        image = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((60, 0, 360, 300))
        expected = np.array(image.resize((256, 256), Image.Resampling.LANCZOS))
        assert found.dtype == torch.uint8 and np.array_equal(found.permute(1, 2, 0).numpy(), expected)
    square = noise(1, 3, 256, 256)
    assert torch.equal(PREPARE["center-lanczos-256"](square), square)


def test_cmmds_crop() -> None:
    image = noise(1, 3, 51, 60)
    cropped = Image.fromarray(image[0].permute(1, 2, 0).numpy()).crop((4, 0, 55, 51))
    expected = np.array(cropped.resize((336, 336), Image.Resampling.BICUBIC))
    assert np.array_equal(PREPARE["center-bicubic-336"](image)[0].permute(1, 2, 0).numpy(), expected)


def test_squashing_rounds_to_8_bits() -> None:
    images = noise(1, 3, 40, 70)
    found = PREPARE["squash-bilinear-299"](images)
    exact = torch.nn.functional.interpolate(images.float(), size=(299, 299), mode="bilinear", align_corners=False)
    assert found.dtype == torch.uint8 and found.shape == (1, 3, 299, 299)
    assert (found.float() - exact).abs().max() < 1
    assert torch.equal(PREPARE["none"](images), images)


@pytest.mark.parametrize("kind", ["tf1", "clean", "pytorch"])
def test_each_image_is_resized_alone(kind: str) -> None:
    images = noise(3, 3, 20, 20)
    whole = network_input(kind, images, 29)
    assert torch.equal(whole[1:2], network_input(kind, images[1:2], 29))
    assert torch.equal(whole.flip(0), network_input(kind, images.flip(0), 29))
    constant = network_input(kind, torch.full((1, 3, 20, 20), 77, dtype=torch.uint8), 29)
    assert torch.allclose(constant, torch.full_like(constant, 77), atol=1e-3)
