"""What stands in a position that enters the window, each with the law it was really drawn from.

A law that is known before the position is looked at keeps the sampler exact; a copied token is a point mass. Forced
positions hold their forced token, as a point mass, and are accepted for free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from visar.kernels.noise import Race
from visar.samplers.verification import draw, race

if TYPE_CHECKING:
    from visar.samplers.base import State

# uniform: a uniform token, with the uniform law. left / above: a copy of the neighbour's token.
# left-law: a fresh draw from the target law of the last position known, the paper's "sample" made honest.
Init = Literal["uniform", "left", "above", "left-law"]


def initial_drafts(
    init: Init,
    grid: int,
    state: State,
    positions: Tensor,
    vocab: int,
    *,
    known: Tensor,
    u: Tensor,
    last_law: Tensor | None,
    shared: Race | None,
) -> tuple[Tensor, Tensor]:
    """Drafts [B, W-1] for `positions` [B, W-1] and their laws [B, W-1, V].

    `state.tokens` is written up to position `known` [B] (exclusive). `u` [B, W-1] is fresh uniform noise. `last_law`
    [B, 1, V] is the law of the token just before `known`, None at the start, where every init is uniform. `shared`
    is the race of the positions under Gumbel coupling, else None: a draft that is drawn takes part in it.
    """
    shape = (*positions.shape, vocab)
    if last_law is None or init == "uniform":
        laws = torch.full((), 1.0 / vocab, device=positions.device).expand(shape)
        drafts = (u * vocab).long() if shared is None else race(laws, shared)
    elif init == "left-law":
        laws = last_law.expand(shape)
        drafts = draw(laws, u) if shared is None else race(laws, shared)
    else:
        source = (known - 1)[:, None].expand_as(positions)
        if init == "above":
            above = positions - grid
            source = torch.where((above >= 0) & (above < known[:, None]), above, source)
        drafts = state.tokens.gather(1, source)
        laws = F.one_hot(drafts, vocab).float()
    if state.target.forced is not None:
        forced = state.target.forced_at(positions)
        drafts = torch.where(forced >= 0, forced, drafts)
        laws = torch.where((forced >= 0)[..., None], F.one_hot(drafts, vocab).float(), laws)
    return drafts, laws


def shift(laws: Tensor, count: Tensor) -> Tensor:
    """Laws [B, W, V] moved left by `count` [B], the first W - 1 of them; what enters from the right is unspecified."""
    window = laws.shape[1]
    at = (torch.arange(window - 1, device=laws.device) + count[:, None]).clamp_max(window - 1)
    return laws[torch.arange(len(laws), device=laws.device)[:, None], at]
