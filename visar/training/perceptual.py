"""A perceptual distance for tokenizers: differences of early features of EfficientNet-lite0, each cell of unit length.

In the manner of LPIPS (Zhang et al. 2018, arXiv:1801.03924), without its learnt weights. Pixel losses alone settle
for soft edges; these features answer to edges and textures. The network comes with the extra `eval`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Perceptual(nn.Module):
    """The distance of two batches of images [B, 3, H, W] in [-1, 1]: a scalar, 0 for equal ones.

    `stages` of the network are used after its stem; none of its weights is trained. Raises `VisarError` where the
    extra is missing.
    """

    def __init__(self, stages: int = 2):
        super().__init__()
        from visar.eval.quality.extractors.lite0 import lite0

        net: Any = lite0().model
        self.parts = nn.ModuleList([nn.Sequential(net.conv_stem, net.bn1), *net.blocks[:stages]])
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Perceptual:
        """Stays in evaluation mode, whatever its owner does: the norms keep their statistics."""
        return super().train(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """After the stem and each stage, [B, C, h, w] in fp32, of unit length over C."""
        found = []
        for part in self.parts:
            x = part(x)
            found.append(F.normalize(x.float(), dim=1))
        return found

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """How far y is from x; gradients flow to y alone."""
        with torch.no_grad():
            wanted = self.features(x)
        return torch.stack(
            [(a - b).square().sum(1).mean() for a, b in zip(self.features(y), wanted, strict=True)]
        ).mean()
