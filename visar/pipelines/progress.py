"""What a step callback is told, and the images it can make of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from visar.engine.loop import Snapshot

GREY = 0.5


@dataclass(frozen=True)
class Progress:
    """How far a decoding is, after `passes` passes in `seconds`; callbacks are not part of the time.

    `tokens` [B, N], of a masked model [B, N, d]; what is not committed yet is a draft. `commit_pass` [B, N] is the pass
    that committed each token, -1 where none has; `lengths` [B] how many are committed, in raster order up to the first
    gap, or wherever they lie in a masked model. `decided` [B, N] marks those that are committed or were given. They do
    not change when the decoding goes on. A callback that raises stops the decoding; its exception reaches the caller.
    """

    passes: int
    seconds: float
    tokens: Tensor
    commit_pass: Tensor
    lengths: Tensor
    decided: Tensor
    glimpse: Callable[[Tensor], Tensor]
    decode_tokens: Callable[[Tensor], Tensor]

    @staticmethod
    def of(
        now: Snapshot,
        given: Tensor | None,
        glimpse: Callable[[Tensor], Tensor],
        decode_tokens: Callable[[Tensor], Tensor],
    ) -> Progress:
        """Of a snapshot, which is copied; `given` [N] marks tokens that no pass commits."""
        commit_pass = now.commit_pass.clone()
        decided = commit_pass >= 0 if given is None else (commit_pass >= 0) | given
        return Progress(
            now.passes, now.seconds, now.tokens.clone(), commit_pass, now.lengths.clone(), decided, glimpse,
            decode_tokens,
        )  # fmt: skip

    def preview(self) -> Tensor:
        """Small RGB images, uint8 [B, grid, grid, 3], one pixel per token, undecided cells grey. Cheap."""
        return to_uint8(self._greyed(self.glimpse(self.tokens)))

    @torch.inference_mode()
    def images(self) -> list[Image.Image]:
        """The images in their full size, undecided cells grey; costs a run of the image decoder."""
        # A draft under grey must not shine through: what a decoder makes of one cell reaches into its neighbours.
        tokens = self.tokens.where(self.decided.view(*self.decided.shape, *[1] * (self.tokens.ndim - 2)), 0)
        return to_pil(self._greyed(self.decode_tokens(tokens)))

    def _greyed(self, pixels: Tensor) -> Tensor:
        """Images [B, 3, H, W] with every undecided cell grey."""
        grid = round(self.decided.shape[1] ** 0.5)
        cells = rearrange(self.decided, "b (h w) -> b 1 h w", h=grid)
        size = pixels.shape[-1] // grid
        return torch.where(cells.repeat_interleave(size, 2).repeat_interleave(size, 3), pixels, GREY)


StepCallback = Callable[[Progress], None]


def to_uint8(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] of [B, 3, H, W] in [0, 1]; rounded to the nearest of 256 levels."""
    return rearrange((pixels * 255).round().to(torch.uint8), "b c h w -> b h w c")


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """PIL images of [B, 3, H, W] in [0, 1]."""
    return [Image.fromarray(a) for a in to_uint8(pixels).cpu().numpy()]
