"""Autoencoders that read blocks of pixels, begun as smaller ones."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def enlarged(state: Mapping[str, Tensor], old: int, patch: int) -> dict[str, Tensor]:
    """The weights of an encoder and decoder of blocks of `old` pixels, for `patch` times as many along a side.

    They start as the old ones between a reduction by means and its repetition, and learn the detail from there.
    """
    state = dict(state)
    state["encoder.conv_in.weight"] = _spread(state["encoder.conv_in.weight"], 1, old, patch) / patch**2
    for name in ("decoder.conv_out.weight", "decoder.conv_out.bias"):
        state[name] = _spread(state[name], 0, old, patch)
    return state


def _spread(weight: Tensor, dim: int, old: int, patch: int) -> Tensor:
    """Each channel of an `old`-fold pixel shuffle along `dim` for all of the pixels that it is split into."""
    grid = weight.unflatten(dim, (3, old, old))
    return grid.repeat_interleave(patch, dim + 1).repeat_interleave(patch, dim + 2).flatten(dim, dim + 2)
