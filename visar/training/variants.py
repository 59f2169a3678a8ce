"""Variants of images for training: zoomed, shifted, mirrored where that keeps the meaning, and slightly recoloured.

A model that sees a thing in one token string only learns the string; among many strings of a thing it learns the thing.
White stays white, and no part of an object is cut off. Tokens of variants are computed once, and kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from visar.errors import VisarError
from visar.families.llamagen.vq import VQModel
from visar.files import replacing
from visar.text_encoders.spelling import words_of
from visar.training.data import ImageSet, Record, to_unit
from visar.training.loop import step_seed

ZOOM = (0.85, 1.1)
SHIFT = 5 / 128  # of the side
INK = 0.08  # how much stronger or weaker each colour's ink may get
PIXELS = 2**21  # that are tokenised at once
PAPER = 250  # at least so bright in all colours is background

# Words of things that a mirror makes wrong: writing, dials, directions, hands named by their side.
_ONE_WAY = """
    letter letters alphabet number numbers digit text writing abc keycap sign arrow arrows left right leftwards
    rightwards facing clockwise clock watch oclock thirty calendar date score hundred japanese music musical note notes
    keyboard newspaper ticket label credit license identification map globe flag playing mahjong question exclamation
    speedometer banknote atm sos stop quarter waxing waning first crescent bus police ambulance
"""
ONE_WAY = frozenset(_ONE_WAY.split())


def mirrors(record: Record) -> bool:
    """Whether the record's image means the same in a mirror; signs and symbols never do."""
    if record.group in ("symbols", "flags"):
        return False
    return ONE_WAY.isdisjoint(words_of(record.caption))


def vary(pixels: Tensor, chance: Tensor, mirrored: Tensor | None = None) -> Tensor:
    """A variant of each of the uint8 images [n, 3, H, W] on white; `mirrored` [n] says which may be flipped (all).

    `chance` [n, 7] are uniform numbers. The zoom is uniform in `ZOOM` and the shift in +-`SHIFT` of the side, both less
    where an object would be cut; half of those that may be are flipped; each colour's ink is scaled by 1 +- `INK`.
    """
    height, width = pixels.shape[2:]
    zoom, right, down, turn, *inks = chance.to(pixels.device).unbind(1)
    inked = pixels.amin(1) < PAPER
    (top, bottom), (left, end) = _extent(inked.any(2)), _extent(inked.any(1))
    tall, wide = bottom - top, end - left
    scale = (ZOOM[0] + (ZOOM[1] - ZOOM[0]) * zoom).minimum(height / tall).minimum(width / wide)
    h, w = ((side * scale + 1e-4).floor().clamp(min=1) for side in (tall, wide))
    flip = turn < 0.5
    if mirrored is not None:
        flip &= mirrored.to(pixels.device)
    y = _placed(top, bottom, h, height, down)
    x = _placed(torch.where(flip, width - end, left), torch.where(flip, width - left, end), w, width, right)
    below, behind = _centres(height, y, tall / h), _centres(width, x, wide / w)  # of the object's first row and column
    columns = torch.where(flip[:, None], end[:, None] - behind, left[:, None] + behind)
    rows = top[:, None] + below
    at = torch.stack(torch.broadcast_tensors(columns[:, None] * 2 / width - 1, rows[:, :, None] * 2 / height - 1), -1)
    inside = (_within(below, tall)[:, :, None] & _within(behind, wide)[:, None])[:, None]
    gains = 1 + INK * (2 * torch.stack(inks, 1) - 1)
    ink = F.grid_sample(255 - pixels.float(), at, mode="bicubic", align_corners=False).clamp(0, 255)
    return (255 - ink * inside * gains[:, :, None, None]).clamp(0, 255).round().to(torch.uint8)


def _extent(marked: Tensor) -> tuple[Tensor, Tensor]:
    """The first index that is marked of each row [n, length], and the last plus 1; all of a row where none is."""
    return marked.int().argmax(1), marked.shape[1] - marked.flip(1).int().argmax(1)


def _placed(start: Tensor, end: Tensor, length: Tensor, side: int, chance: Tensor) -> Tensor:
    """Where a part of [start, end) that is `length` long now begins: zoomed about the middle of the side, shifted."""
    middle = side / 2 + ((start + end) / 2 - side / 2) * length / (end - start)
    at = (middle - length / 2 + side * SHIFT * (2 * chance - 1)).round()
    return at.clamp(min=0).minimum(side - length)


def _within(x: Tensor, length: Tensor) -> Tensor:
    return (x > 0) & (x < length[:, None])


def _centres(side: int, start: Tensor, step: Tensor) -> Tensor:
    """How far behind the pixel `start` [n] the centre of each pixel of a side is, in `step` [n] per pixel."""
    return (torch.arange(side, device=start.device) + 0.5 - start[:, None]) * step[:, None]


class VariantTokens:
    """The tokens of `count` variants of each image of a set, computed when first asked for, and then kept.

    The first variant is the image as it is. Which variants there are depends on the seed alone. With a `file`, `save`
    keeps what is computed there, and a run that goes on begins with it. Raises `VisarError` where the file is damaged,
    or of another tokenizer, set or version.
    """

    def __init__(self, vq: VQModel, data: ImageSet, size: int, count: int, file: Path | None = None, seed: int = 0):
        self.vq, self.seed, self.file = vq, seed, file
        self.pixels = data.pixels(size)
        self.mirrored = torch.tensor([mirrors(r) for r in data.records])
        kept = torch.int16 if vq.sizes.codebook_size <= 2**15 else torch.int32
        self.tokens = torch.full((len(self.pixels), count, (size // vq.sizes.downsample) ** 2), -1, dtype=kept)
        named = [vq.sizes, size, count, seed, ZOOM, SHIFT, INK, "bicubic", [r.file for r in data.records]]
        mark = hashlib.sha256(repr(named).encode())
        for tensor in (*vq.encoder.parameters(), *vq.quant_conv.parameters(), vq.quantize.embedding.weight):
            mark.update(tensor.detach().float().cpu().numpy().tobytes())
        self.mark = mark.hexdigest()
        if file is not None and file.exists():
            self.tokens = self._saved(file)

    @torch.no_grad()
    def __call__(self, rows: Sequence[int], variants: Sequence[int]) -> Tensor:
        """Ids [n, h*w], long, of the given variant of each of the given images."""
        row, k = torch.tensor(rows, dtype=torch.long), torch.tensor(variants, dtype=torch.long)
        missing = torch.stack([row, k], 1)[self.tokens[row, k, 0] < 0].unique(dim=0)
        batch = max(1, PIXELS // self.pixels[0, 0].numel())
        for start in range(0, len(missing), batch):
            i, j = missing[start : start + batch].unbind(1)
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # codes are those of a CPU
                ids = self.vq.encode(to_unit(self._images(i, j)))
            self.tokens[i, j] = ids.cpu().to(self.tokens.dtype)
        return self.tokens[row, k].long()

    def _images(self, rows: Tensor, variants: Tensor) -> Tensor:
        """Pixels on the tokenizer's device; each variant has a generator of its own."""
        x, varied = self.pixels[rows].to(self.vq.device), variants > 0
        if varied.any():
            some, these = rows[varied], variants[varied]
            seeds = (step_seed(self.seed, k, i) for i, k in zip(some.tolist(), these.tolist(), strict=True))
            chance = torch.stack([torch.rand(7, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
            x[varied.to(x.device)] = vary(x[varied.to(x.device)], chance, self.mirrored[some])
        return x

    def save(self) -> None:
        """Keep what is computed in the file, if there is one."""
        if self.file is not None:
            with replacing(self.file) as part:
                save_file({"tokens": self.tokens}, part, {"of": self.mark})

    def _saved(self, file: Path) -> Tensor:
        try:
            with safe_open(file, "pt") as saved:
                tokens: Tensor = saved.get_tensor("tokens")
                found = saved.metadata()["of"]
        except Exception as error:
            raise VisarError(f"{file} is damaged; delete it to have the variants made anew.") from error
        if found != self.mark or tokens.shape != self.tokens.shape:
            raise VisarError(
                f"{file} holds tokens of another tokenizer, of other images or of another visar; give another folder."
            )
        return tokens
