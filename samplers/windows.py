"""Drafts for positions that enter the window, each with the distribution it was really sampled from.

The sampler stays exact while that distribution is known before the draft is sampled; a copied token is a point mass.
Forced positions hold their forced token, as a point mass, and are accepted for free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from visar.kernels.noise import ExponentialNoise
from visar.samplers.verification import gumbel_max, sample

if TYPE_CHECKING:
    from visar.samplers.base import State

# uniform: a uniform token, with the uniform distribution. left / above: a copy of the neighbour's token.
# left-probs: a fresh sample from the target distribution of the last position known, the paper's "sample" made honest.
# above-probs: the same of the cell above; mean-probs: of the mean of the two. In an order of its own "left" is the
# nearest cell that is known.
Init = Literal["uniform", "left", "above", "left-probs", "above-probs", "mean-probs"]
PROBS = ("left-probs", "above-probs", "mean-probs")


def initial_drafts(
    init: Init,
    stride: int,
    state: State,
    positions: Tensor,
    vocab: int,
    *,
    known: Tensor,
    u: Tensor,
    last_probs: Tensor | None,
    seen: Tensor,
    nearest: Tensor | None = None,
    shared: ExponentialNoise | None,
) -> tuple[Tensor, Tensor]:
    """Drafts [B, W-1] for `positions` [B, W-1], and the distributions [B, W-1, V] that they are sampled from.

    `stride` is the number of tokens from a cell to the one below it, for "above". `state.tokens` is written up to
    position `known` [B] (exclusive). `u` [B, W-1] is fresh uniform noise. `last_probs` [B, 1, V] is the distribution of
    the token just before `known`, None at the start, where every init is uniform. `seen` [B, R, V] are those of the
    latest positions before it, each at its number modulo R, for "above-probs" and "mean-probs". `nearest` [B, W-1], in
    another order than the raster's, are the known positions of the cells that take the place of those to the left.
    `shared` is the exponential noise of the positions under Gumbel coupling, else None: a draft that is sampled takes
    part in it.
    """
    shape = (*positions.shape, vocab)
    if last_probs is None or init == "uniform":
        if (allowed := state.target.allowed) is None:
            draft_probs = torch.full((), 1.0 / vocab, device=positions.device).expand(shape)
            drafts = (u * vocab).long() if shared is None else gumbel_max(draft_probs, shared)
        else:
            draft_probs = (allowed / allowed.sum()).expand(shape)
            drafts = sample(draft_probs, u) if shared is None else gumbel_max(draft_probs, shared)
    elif init in PROBS:
        draft_probs, rows = last_probs.expand(shape), torch.arange(len(seen), device=seen.device)[:, None]
        if nearest is not None:
            draft_probs = seen[rows, nearest]
        elif init != "left-probs":
            above = positions - stride
            is_known = ((above >= 0) & (above < known[:, None]))[..., None]
            draft_probs = torch.where(is_known, seen[rows, above % seen.shape[1]], draft_probs)
            if init == "mean-probs":
                draft_probs = (draft_probs + last_probs) / 2
        drafts = sample(draft_probs, u) if shared is None else gumbel_max(draft_probs, shared)
    else:
        source = (known - 1)[:, None].expand_as(positions) if nearest is None else nearest
        if init == "above":
            above = positions - stride
            source = torch.where((above >= 0) & (above < known[:, None]), above, source)
        drafts = state.tokens.gather(1, source)
        draft_probs = F.one_hot(drafts, vocab).float()
    if state.target.forced is not None:
        forced = state.target.forced_at(positions)
        drafts = torch.where(forced >= 0, forced, drafts)
        draft_probs = torch.where((forced >= 0)[..., None], F.one_hot(drafts, vocab).float(), draft_probs)
    return drafts, draft_probs


def shift(draft_probs: Tensor, count: Tensor) -> Tensor:
    """The first W - 1 of [B, W, V] moved left by `count` [B]; what enters from the right is unspecified."""
    window = draft_probs.shape[1]
    at = (torch.arange(window - 1, device=draft_probs.device) + count[:, None]).clamp_max(window - 1)
    return draft_probs[torch.arange(len(draft_probs), device=draft_probs.device)[:, None], at]
