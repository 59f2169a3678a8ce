"""Feature extractors of picture evaluation, each with the resizing that its protocol prescribes."""

from __future__ import annotations

import torch

from visar.errors import unknown
from visar.eval.extractors.base import Extractor, Features, as_uint8

__all__ = ["Extractor", "Features", "as_uint8", "get_extractor"]

NAMES = ("efflite0",)


def get_extractor(name: str, device: torch.device | str = "cpu", weights: str | None = None) -> Extractor:
    """The extractor of that name on a device."""
    if name == "efflite0":
        from visar.eval.extractors.lite0 import lite0

        return lite0(device)
    raise unknown("extractor", name, NAMES)
