"""The argument of step callbacks, and images of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from visar.engine.loop import Snapshot
from visar.errors import VisarError
from visar.families.base import Family

GREY = 0.5


@dataclass(frozen=True)
class Progress:
    """The state of a decoding after `passes` in `seconds`, callbacks excluded.

    `tokens` [B, N], of a masked model [B, N, d]; tokens that are not committed yet are drafts. `commit_pass` [B, N] is
    the pass that committed each token, -1 if none has; `lengths` [B] the number of committed tokens, in raster order up
    to the first gap, or at any positions in a masked model. `known` [B, N] marks committed and given tokens. The
    tensors are copies. An exception in a callback stops the decoding and reaches the caller.
    """

    passes: int
    seconds: float
    tokens: Tensor
    commit_pass: Tensor
    lengths: Tensor
    known: Tensor
    family: Family

    @staticmethod
    def of(now: Snapshot, given: Tensor | None, family: Family) -> Progress:
        """A copy of a snapshot; `given` [N] marks tokens that no pass commits."""
        with torch.inference_mode(False):
            commit_pass = now.commit_pass.clone()
            known = commit_pass >= 0 if given is None else (commit_pass >= 0) | given.clone()
            return Progress(
                now.passes, now.seconds, now.tokens.clone(), commit_pass, now.lengths.clone(), known, family
            )

    def preview(self) -> Tensor:
        """Small RGB images, uint8 [B, rows, columns, 3], one pixel per token, grey where unknown. Fast."""
        with torch.inference_mode(False), torch.no_grad():
            return to_uint8(self._greyed(self.family.preview(self.tokens)))

    def images(self) -> list[Image.Image]:
        """The images in full size, grey where tokens are unknown. Runs the image decoder."""
        with torch.inference_mode(False), torch.no_grad():
            # A decoder's receptive field spans several cells, so replace drafts before decoding.
            tokens = self.tokens.where(self.known.view(*self.known.shape, *[1] * (self.tokens.ndim - 2)), 0)
            return to_pil(self._greyed(self.family.decode(tokens)))

    def _greyed(self, pixels: Tensor) -> Tensor:
        """Images [B, 3, H, W] with every unknown cell grey."""
        cells = self.family.layout.cells(self.known)[:, None]
        down, across = pixels.shape[-2] // cells.shape[-2], pixels.shape[-1] // cells.shape[-1]
        return torch.where(cells.repeat_interleave(down, 2).repeat_interleave(across, 3), pixels, GREY)


StepCallback = Callable[[Progress], None]


def check_callback(name: str, callback: Any, arguments: tuple[str, ...]) -> None:
    """Raise `VisarError` for what cannot be called with so many arguments, which the first pass would show."""
    try:
        inspect.signature(callback).bind(*arguments)
    except (TypeError, ValueError) as error:
        if isinstance(error, ValueError) and not isinstance(callback, type):
            return  # a function of C that does not say what it takes
        raise VisarError(f"{name} must be a function of ({', '.join(arguments)}), not {callback!r}.") from error


def to_uint8(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] of [B, 3, H, W] in [0, 1]; rounded to the nearest of 256 levels."""
    return rearrange((pixels * 255).round().to(torch.uint8), "b c h w -> b h w c")


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """PIL images of [B, 3, H, W] in [0, 1]."""
    return [Image.fromarray(a) for a in to_uint8(pixels).cpu().numpy()]
