"""A fast preview of tokens: one colour per code, without the image decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from visar.families.llamagen.vq import VQModel


@dataclass(frozen=True)
class CodePreview:
    """`colours` [codebook_size, 3], RGB in [0, 1]."""

    colours: Tensor

    @staticmethod
    @torch.inference_mode()
    def fit(vq: VQModel, samples: int = 256) -> CodePreview:
        """Fit colour as a quadratic function of the code to decoded images of one code each."""
        codes = vq.quantize.codes.float()
        pick = torch.linspace(0, len(codes) - 1, min(samples, len(codes)), device=codes.device).long()
        patches = [vq.decode(part[:, None].expand(-1, 4), 2) for part in pick.split(32)]
        colours = (torch.cat(patches).float().mean((2, 3)) / 2 + 0.5).clamp(0, 1)

        def terms(x: Tensor) -> Tensor:
            pairs = torch.einsum("ni,nj->nij", x, x).flatten(1)
            return torch.cat([torch.ones_like(x[:, :1]), x, pairs], dim=1)

        # The quadratic terms are redundant, so a small ridge penalty makes the solution unique.
        a = terms(codes[pick])
        solution = torch.linalg.solve(a.T @ a + 1e-3 * torch.eye(a.shape[1], device=a.device), a.T @ colours)
        return CodePreview((terms(codes) @ solution).clamp(0, 1))

    def __call__(self, tokens: Tensor, grid: int) -> Tensor:
        """RGB in [0, 1], [B, 3, grid, grid], for tokens [B, grid**2]."""
        colours = F.embedding(tokens, self.colours.to(tokens.device))
        return rearrange(colours, "b (h w) c -> b c h w", h=grid)
