"""A cheap look at tokens while they are decoded: one colour per code, without the picture decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from visar.models.vq import VQModel

GREY = 0.5


@dataclass(frozen=True)
class CodePreview:
    """`colours` [codebook_size, 3], RGB in [0, 1]."""

    colours: Tensor

    @staticmethod
    @torch.inference_mode()
    def fit(vq: VQModel, samples: int = 256) -> CodePreview:
        """Fit colour as a quadratic function of the code to what the decoder makes of some codes standing alone."""
        codes = vq.quantize.codes.float()
        pick = torch.linspace(0, len(codes) - 1, min(samples, len(codes)), device=codes.device).long()
        patches = [vq.decode(part[:, None].expand(-1, 4), 2) for part in pick.split(32)]
        seen = (torch.cat(patches).float().mean((2, 3)) / 2 + 0.5).clamp(0, 1)

        def terms(x: Tensor) -> Tensor:
            pairs = torch.einsum("ni,nj->nij", x, x).flatten(1)
            return torch.cat([torch.ones_like(x[:, :1]), x, pairs], dim=1)

        # Quadratic terms repeat each other, so the least-squares solution is not unique: a little ridge picks one.
        a = terms(codes[pick])
        solution = torch.linalg.solve(a.T @ a + 1e-3 * torch.eye(a.shape[1], device=a.device), a.T @ seen)
        return CodePreview((terms(codes) @ solution).clamp(0, 1))

    def __call__(self, tokens: Tensor, lengths: Tensor, grid: int) -> Tensor:
        """uint8 [B, grid, grid, 3] for tokens [B, grid**2], of which row b has decided the first `lengths[b]`."""
        colours = F.embedding(tokens, self.colours.to(tokens.device))
        decided = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        colours = torch.where(decided[..., None], colours, torch.full_like(colours, GREY))
        return (colours * 255).round().to(torch.uint8).unflatten(1, (grid, grid))
