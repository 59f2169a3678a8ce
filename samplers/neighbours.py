"""Which codes of a codebook look alike: a table of nearest codes, computed once per tokenizer and cached on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from visar.errors import VisarError
from visar.files import cache_folder, replacing


def nearest(codebook: Tensor, k: int, rows: int = 1024) -> Tensor:
    """The k nearest other codes of each code, [V, k] int64, nearest first, for a codebook [V, D].

    By their distance, so the codes are to be those that the tokenizer compares. Ties go to the lower id.
    """
    x = codebook.float()
    half = x.square().sum(-1) / 2
    out = []
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        alike = part @ x.T - half
        own = torch.arange(start, start + len(part), device=x.device)[:, None]
        alike.scatter_(1, own, -torch.inf)
        out.append(alike.sort(dim=-1, descending=True, stable=True).indices[:, :k].clone())
    return torch.cat(out)


_known: dict[tuple[str, int], Tensor] = {}


def neighbours(codebook: Tensor, k: int) -> Tensor:
    """`nearest` of a codebook, from memory or from the cache folder where a table for these very codes is there."""
    if not 1 <= k < len(codebook):
        raise VisarError(f"k must be from 1 to {len(codebook) - 1}, the other codes of the codebook; not {k}.")
    mark = hashlib.sha256(codebook.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
    if (table := _known.get((mark, k))) is None:
        file = cache_folder() / f"nearest-{mark}-{k}.safetensors"
        try:
            table = load_file(file)["nearest"].long()
        except Exception:  # not there, cut off, or unreadable: it is made again
            table = nearest(codebook, k).cpu()
            _save(file, table)
        _known[mark, k] = table
    return table.to(codebook.device)


def _save(file: Path, table: Tensor) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            save_file({"nearest": table.int().contiguous()}, temporary)
    except OSError:
        pass  # without a cache the table is made again, in about a second
