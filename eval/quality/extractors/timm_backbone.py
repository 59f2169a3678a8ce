"""Features of any timm model; those of DINOv2 are what FD-DINOv2 is of (Stein et al. 2023, arXiv:2306.04675)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visar.engine.weight_files import read_content
from visar.errors import VisarError
from visar.eval.quality.extractors.base import Extractor, frozen, missing_extra, no_weights, weights_hash
from visar.eval.quality.extractors.resize import pil_bicubic

DINOV2 = "vit_large_patch14_dinov2.lvd142m"
_DINOV2_PIXELS = 224
_HUB_OFFSET = 0.1  # DINOv2's own code adds it to the grid before it scales, and published features are so


class TimmBackbone(Extractor):
    """ "pool" [B, D]: what the model gives to its classifier. Images are resized as dgm-eval does it."""

    def __init__(self, name: str, model: Any, size: int, device: torch.device | str, versions: dict[str, str]) -> None:
        self.name, self.size, self.device, self.versions = name, size, device, versions
        self.resize = f"{size} px, Pillow bicubic in floats per channel, clipped"
        self.model = frozen(model, device)
        self.weights = weights_hash(model)
        self.mean, self.std = (
            torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1).to(device) for key in ("mean", "std")
        )

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        x = pil_bicubic(images, self.size, clip=True).to(self.device) / 255
        return {"pool": self.model((x - self.mean) / self.std)}


def timm_backbone(
    model: str, device: torch.device | str = "cpu", weights: str | None = None, name: str | None = None
) -> TimmBackbone:
    """The model of timm's name with its weights, which timm downloads, or with those of a file (`weights`).

    DINOv2 was trained at 518 pixels, and is used at 224 with its positions interpolated as its authors' code does.
    """
    try:
        import timm
    except ImportError as error:
        raise missing_extra("Features of timm models", error) from error
    if not timm.is_model(model.split(".")[0]):
        raise VisarError(f"timm has no model {model!r}; `timm.list_models()` names those it has.")
    if weights is not None:
        read_content(weights)  # it says better than timm why a file cannot be read
    overlay: dict[str, Any] = {"pretrained_cfg_overlay": {"file": weights}} if weights else {}
    try:
        network: Any = timm.create_model(model, pretrained=True, num_classes=0, **overlay)
    except Exception as error:  # its downloaders raise errors of many libraries
        raise no_weights("The weights", model, weights, error) from error
    size = int(network.pretrained_cfg["input_size"][-1])
    if "dinov2" in model:
        size = _DINOV2_PIXELS
        positions = network.pos_embed.detach()
        network.set_input_size(img_size=size)
        network.pos_embed = nn.Parameter(hub_positions(positions, size // network.patch_embed.patch_size[0]))
    return TimmBackbone(name or f"timm:{model}", network, size, device, {"timm": timm.__version__})


def hub_positions(positions: Tensor, side: int) -> Tensor:
    """Positions [1, 1 + n * n, D], the class token first, for a grid of `side`: bicubic, not antialiased.

    The scale is (side + 0.1) / n, as in DINOv2's own code; timm would resize to the side itself, with antialiasing.
    """
    token, grid = positions[:, :1], positions[:, 1:]
    old = round(grid.shape[1] ** 0.5)
    scale = (side + _HUB_OFFSET) / old
    grid = grid.unflatten(1, (old, old)).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    return torch.cat([token, grid.permute(0, 2, 3, 1).flatten(1, 2).to(token.dtype)], 1)
