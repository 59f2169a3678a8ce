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
from visar.text_encoders.words import words_of
from visar.training.data import ImageSet, Record, to_unit
from visar.training.loop import step_seed

ZOOM = (0.85, 1.1)
SHIFT = 5 / 128  # of the side
INK = 0.08  # how much stronger or weaker each colour's ink may get
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


def vary(pixels: Tensor, g: torch.Generator, mirrored: Tensor | None = None) -> Tensor:
    """A variant of each of the uint8 images [n, 3, H, W] on white; `mirrored` [n] says which may be flipped (all).

    Zoom is uniform in `ZOOM` and the shift in +-`SHIFT` of the side, both less where an object would be cut; half of
    those that may be are flipped; the ink of each colour is scaled by 1 +- `INK`.
    """
    n, _, height, width = pixels.shape
    chance = torch.rand(n, 7, generator=g)
    out = torch.full_like(pixels, 255)
    for i, x in enumerate(pixels):
        zoom, right, down, flip, *inks = chance[i].tolist()
        ink = x.amin(0) < PAPER
        rows, columns = (ink.any(d).nonzero().flatten() for d in (1, 0))
        if not len(rows):
            continue
        top, bottom, left, end = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
        part = x[:, top:bottom, left:end]
        scale = ZOOM[0] + (ZOOM[1] - ZOOM[0]) * zoom
        scale = min(scale, height / (bottom - top), width / (end - left))
        h, w = max(1, int((bottom - top) * scale)), max(1, int((end - left) * scale))
        small = F.interpolate(part[None].float(), size=(h, w), mode="bicubic", antialias=True)[0].clamp(0, 255)
        if flip < 0.5 and (mirrored is None or bool(mirrored[i])):
            small = small.flip(-1)
            left = width - end
        gains = 1 + INK * (2 * torch.tensor(inks) - 1)
        small = 255 - (255 - small) * gains[:, None, None]
        y = _placed(top, bottom, h, height, down)
        z = _placed(left, left + part.shape[2], w, width, right)
        out[i, :, y : y + h, z : z + w] = small.clamp(0, 255).round().to(torch.uint8)
    return out


def _placed(start: int, end: int, length: int, side: int, chance: float) -> int:
    """Where a part of [start, end) that is `length` long now begins: zoomed about the middle of the side, shifted."""
    middle = side / 2 + ((start + end) / 2 - side / 2) * length / (end - start)
    at = round(middle - length / 2 + side * SHIFT * (2 * chance - 1))
    return min(max(at, 0), side - length)


class VariantTokens:
    """The tokens of `count` variants of each image of a set, computed when first asked for, and then kept.

    The first variant is the image as it is. Which variants there are depends on the seed alone. With a `file`, `save`
    keeps what is computed there, and a run that goes on begins with it. Raises `VisarError` where the file is damaged,
    or of another tokenizer or set.
    """

    def __init__(self, vq: VQModel, data: ImageSet, size: int, count: int, file: Path | None = None, seed: int = 0):
        self.vq, self.seed, self.file = vq, seed, file
        self.pixels = data.pixels(size)
        self.mirrored = [mirrors(r) for r in data.records]
        kept = torch.int16 if vq.sizes.codebook_size <= 2**15 else torch.int32
        self.tokens = torch.full((len(self.pixels), count, (size // vq.sizes.downsample) ** 2), -1, dtype=kept)
        named = [vq.sizes, size, count, seed, ZOOM, SHIFT, INK, [r.file for r in data.records]]
        mark = hashlib.sha256(repr(named).encode())
        for tensor in (*vq.encoder.parameters(), *vq.quant_conv.parameters(), vq.quantize.embedding.weight):
            mark.update(tensor.detach().float().cpu().numpy().tobytes())
        self.mark = mark.hexdigest()
        if file is not None and file.exists():
            self.tokens = self._saved(file)

    @torch.no_grad()
    def __call__(self, rows: Sequence[int], variants: Sequence[int], batch: int = 32) -> Tensor:
        """Ids [n, h*w], long, of the given variant of each of the given images."""
        wanted = dict.fromkeys(zip(rows, variants, strict=True))
        missing = [(i, k) for i, k in wanted if self.tokens[i, k, 0] < 0]
        for start in range(0, len(missing), batch):
            part = missing[start : start + batch]
            x = torch.cat([self._image(i, k) for i, k in part])
            ids = self.vq.encode(to_unit(x.to(self.vq.device))).cpu().to(self.tokens.dtype)
            for (i, k), row in zip(part, ids, strict=True):
                self.tokens[i, k] = row
        return self.tokens[list(rows), list(variants)].long()

    def _image(self, row: int, k: int) -> Tensor:
        x = self.pixels[row : row + 1]
        if k == 0:
            return x
        return vary(x, torch.Generator().manual_seed(step_seed(self.seed, k, row)), torch.tensor([self.mirrored[row]]))

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
            raise VisarError(f"{file} holds tokens of another tokenizer or other images; give another folder.")
        return tokens
