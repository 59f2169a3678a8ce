"""The output of a call: images, tokens, the pass that committed each token, and stats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from visar.errors import VisarError
from visar.generation.notebook import output_html
from visar.generation.progress import to_pil
from visar.generation.stats import DecodeStats

OUTPUT_TYPES = ("pil", "pt", "np", "latent", "tokens")


@dataclass
class ImageOutput:
    """`images`: by `output_type` PIL images, a tensor [B, 3, H, W] in [0, 1] ("pt"), an array [B, H, W, 3] ("np"), the
    tokens ("latent") or None ("tokens"). `tokens` [B, N], of continuous models [B, N, d].

    `commit_pass` [B, N] is the pass that committed each token, -1 for tokens that were given to a masked model; `stats`
    has metrics and settings. It can be indexed like an output of diffusers: `out[0]`, `out["images"]`.
    """

    images: Any
    tokens: Tensor
    commit_pass: Tensor
    stats: DecodeStats

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))

    def keys(self) -> list[str]:
        return [f.name for f in fields(self)]

    def __getitem__(self, key: int | str | slice) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __repr__(self) -> str:
        return f"ImageOutput(tokens {list(self.tokens.shape)}, {self.stats})"

    def _repr_html_(self) -> str:
        images = self.images
        if isinstance(images, np.ndarray):
            images = [Image.fromarray((x * 255).round().astype("uint8")) for x in images]
        elif isinstance(images, Tensor):
            images = to_pil(images) if images.ndim == 4 else []
        return output_html(images or [], self.stats)


def checked_output(output_type: str) -> None:
    """Raise `VisarError` for an unknown kind of output."""
    if output_type not in OUTPUT_TYPES:
        raise VisarError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {output_type!r}.")


def as_output(pixels: Any, tokens: Tensor, output_type: str) -> Any:
    """Images of the `output_type`; `pixels` gives [B, 3, H, W] in [0, 1] and is called only if needed."""
    if output_type == "tokens":
        return None
    if output_type == "latent":
        return tokens
    images = pixels()
    if output_type == "pt":
        return images
    return images.permute(0, 2, 3, 1).cpu().numpy() if output_type == "np" else to_pil(images)
