"""Variants of pictures for training: zoomed, shifted, mirrored where that keeps the meaning, and slightly recoloured.

A model that sees a thing in one token string only learns the string; among many strings of a thing it learns the thing.
White stays white, and no part of a drawing is cut off.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visar.training.data import Record
from visar.models.words import words_of

ZOOM = (0.85, 1.1)
SHIFT = 5 / 128  # of the side
INK = 0.12  # how much stronger or weaker each colour's ink may get
PAPER = 250  # at least so bright in all colours is background

# Words of things that a mirror makes wrong: writing, dials, directions, hands named by their side.
ONE_WAY = frozenset(
    "letter letters alphabet number numbers digit text word words writing abc abcd latin symbol keycap sign button arrow "
    "arrows left right leftwards rightwards clockwise counterclockwise clock watch oclock o'clock thirty time calendar "
    "date math plus minus input score hundred points japanese ideograph kanji katakana hiragana music note notes clef "
    "sos vs ok cool free new up atm wc id cl ng soon end back top on bank banknote yen dollar euro pound currency "
    "keyboard newspaper book books passport ticket label credit card license chess map globe flag playing mahjong "
    "dice domino question mark signpost speed thermometer scale zodiac".split()
)


def mirrors(record: Record) -> bool:
    """Whether the record's picture means the same in a mirror; signs and symbols never do."""
    if record.group in ("symbols", "flags"):
        return False
    return ONE_WAY.isdisjoint(words_of(record.caption))


def vary(pixels: Tensor, g: torch.Generator, mirrored: Tensor | None = None) -> Tensor:
    """A variant of each of the uint8 pictures [n, 3, H, W] on white; `mirrored` [n] says which may be flipped (all).

    Zoom is uniform in `ZOOM` and the shift in +-`SHIFT` of the side, both less where a drawing would be cut; half of
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
