"""Resizing as the evaluators of the field do it, on uint8 images [B, 3, H, W].

Which resizing it was moves FID by more than many papers' gains (Parmar et al. 2022, arXiv:2104.11222), so each is
written out here by its definition. The first group gives what a network is fed, floats in [0, 255] (`pil_bicubic` may
overshoot unless clipped); the second, `PREPARE`, gives uint8 images, and is what a protocol does to them before.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from visar.errors import VisarError


def tf1_bilinear(images: Tensor, size: int) -> Tensor:
    """TensorFlow 1's ResizeBilinear (corners not aligned), as in the Inception graph of FID and of ADM's evaluator.

    Output pixel i reads input i * (old / new), with no half-pixel shift and no antialiasing.
    """
    x = images.float()
    (top, bottom, dy), (left, right, dx) = (_tf1_places(old, size, x.device) for old in x.shape[2:])
    rows_above, rows_below = x[:, :, top], x[:, :, bottom]
    above, below = (r[..., left] + (r[..., right] - r[..., left]) * dx for r in (rows_above, rows_below))
    return above + (below - above) * dy[:, None]


def _tf1_places(old: int, new: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of each output pixel: both input pixels, and how far it lies from the first to the second."""
    position = torch.arange(new, dtype=torch.float32, device=device) * torch.tensor(old / new, dtype=torch.float32)
    low = position.long()
    return low, (low + 1).clamp(max=old - 1), position - low


def torch_bilinear(images: Tensor, size: int) -> Tensor:
    """Torch's bilinear resizing with half-pixel centres and no antialiasing, of images in [0, 1], as pytorch-fid."""
    return F.interpolate(images.float() / 255, size=(size, size), mode="bilinear", align_corners=False) * 255


def pil_bicubic(images: Tensor, size: int, clip: bool = False) -> Tensor:
    """Pillow's antialiased bicubic resizing in floats, channel by channel: clean-fid's; with `clip`, dgm-eval's."""
    planes = images.cpu().flatten(0, 1).float().numpy()
    if planes.shape[1:] == (size, size):
        resized = planes
    else:
        each = (Image.fromarray(plane).resize((size, size), Image.Resampling.BICUBIC) for plane in planes)
        resized = np.stack([np.asarray(image) for image in each])
    out = torch.from_numpy(resized).unflatten(0, images.shape[:2])
    return out.clamp(0, 255) if clip else out


def center_crop(images: Tensor) -> Tensor:
    """The largest square in the middle; odd margins are split as torchvision splits them."""
    height, width = images.shape[2:]
    side = min(height, width)
    top, left = round((height - side) / 2), round((width - side) / 2)
    return images[:, :, top : top + side, left : left + side]


def _pil(images: Tensor, size: int, kind: Image.Resampling) -> Tensor:
    """Pillow's resizing of 8-bit images."""
    each = (Image.fromarray(p.permute(1, 2, 0).contiguous().numpy()) for p in images.cpu())
    resized = [np.array(image.resize((size, size), kind)) for image in each]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


def center_lanczos_256(images: Tensor) -> Tensor:
    """Centre crop, then Pillow's Lanczos to 256 pixels: LlamaGen's text-to-image evaluation, GigaGAN's before it."""
    return _pil(center_crop(images), 256, Image.Resampling.LANCZOS)


def center_bicubic_336(images: Tensor) -> Tensor:
    """Centre crop, margins rounded down, then Pillow's bicubic to 336 pixels: CMMD's."""
    height, width = images.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return _pil(images[:, :, top : top + side, left : left + side], 336, Image.Resampling.BICUBIC)


def squash_299(images: Tensor) -> Tensor:
    """Torch's bilinear resizing of 8-bit numbers to 299 pixels, sides apart and not antialiased: SJD's, before CLIP."""
    return F.interpolate(images.cpu(), size=(299, 299), mode="bilinear", align_corners=False)


def as_they_are(images: Tensor) -> Tensor:
    return images


PREPARE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": as_they_are,
    "center-lanczos-256": center_lanczos_256,
    "center-bicubic-336": center_bicubic_336,
    "squash-bilinear-299": squash_299,
}


def network_input(kind: str, images: Tensor, size: int) -> Tensor:
    """Floats [B, 3, size, size] in [0, 255] by the resizing of that name."""
    if kind == "tf1":
        return tf1_bilinear(images, size)
    if kind == "pytorch":
        return torch_bilinear(images, size)
    if kind == "clean":
        return pil_bicubic(images, size)
    raise VisarError(f"Unknown resizing {kind!r}. Known: clean, pytorch, tf1.")
