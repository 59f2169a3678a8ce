"""Feature extractors of image evaluation, each with the resizing that its protocol prescribes."""

from __future__ import annotations

import torch

from visar.errors import VisarError, unknown
from visar.eval.quality.extractors.base import Extractor, Features, as_uint8

__all__ = ["EXTRACTORS", "Extractor", "Features", "as_uint8", "get_extractor"]

EXTRACTORS = (
    "efflite0", "inception-tf1", "inception-clean", "inception-pytorch", "dinov2", "clip-vit-b32", "clip-vit-b16",
    "clip-vit-l14-336", "icons-clip", "clip:MODEL/PRETRAINED", "timm:MODEL",
)  # fmt: skip


def get_extractor(name: str, device: torch.device | str = "cpu", weights: str | None = None) -> Extractor:
    """The extractor of that name on a device; `weights` is a file of them, for machines that download nothing.

    `clip:` and `timm:` take any model of open_clip's and timm's tables.
    """
    if name == "efflite0":
        from visar.eval.quality.extractors.lite0 import lite0

        if weights is not None:
            raise VisarError("efflite0 has its weights from the extra `eval`, and takes no file of them.")
        return lite0(device)
    if name in EXTRACTORS and name.startswith("inception-"):
        from visar.eval.quality.extractors.inception import inception

        return inception(name.removeprefix("inception-"), device, weights)
    if name in EXTRACTORS and name.startswith("clip-"):
        from visar.eval.quality.extractors.clip import MODELS, clip

        return clip(*MODELS[name], device, weights, name)
    if name == "dinov2":
        from visar.eval.quality.extractors.timm_backbone import DINOV2, timm_backbone

        return timm_backbone(DINOV2, device, weights, name)
    if name == "icons-clip":
        from visar.eval.quality.extractors.icons_clip import icons_clip

        return icons_clip(device, weights)
    kind, _, model = name.partition(":")
    if kind == "clip" and "/" in model:
        from visar.eval.quality.extractors.clip import clip

        network, _, pretrained = model.rpartition("/")
        return clip(network, pretrained, device, weights)
    if kind == "timm" and model:
        from visar.eval.quality.extractors.timm_backbone import timm_backbone

        return timm_backbone(model, device, weights)
    raise unknown("extractor", name, EXTRACTORS)
