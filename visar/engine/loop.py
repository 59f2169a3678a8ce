"""The loop that runs a sampler's steps until every row is done, and what it measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from visar.engine.rng import Noise
from visar.engine.session import Session

if TYPE_CHECKING:
    from visar.engine.masked_session import MaskedSession
    from visar.samplers.base import State
    from visar.samplers.distribution import Target
    from visar.samplers.masked import ContinuousTarget, MaskedState

# (passes so far, tokens [B, N, ...] with drafts behind the committed ones, committed lengths [B])
Callback = Callable[[int, Tensor, Tensor], None]


class Decoded(NamedTuple):
    """`tokens` [B, N], of masked models [B, N, d]; `commit_pass` [B, N], the pass that committed each; `passes` run;
    `seconds` they took."""

    tokens: Tensor
    commit_pass: Tensor
    passes: int
    seconds: float


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read next to this means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def decode(
    session: Session | MaskedSession,
    sampler: Any,
    target: Target | ContinuousTarget,
    noise: Noise,
    callback: Callback | None = None,
    every: int | None = None,
) -> Decoded:
    """Run `sampler` on a fresh session of its family.

    `callback` is told, and the rows are looked at, after `every` passes: by default each on a CPU and every fourth on a
    GPU, where a look makes the host wait. Passes that turn out to have been idle are counted. Raises `VisarError` where
    the model's arithmetic overflowed.
    """
    every = every or (1 if session.device.type == "cpu" else 4)
    fewest = -(-session.length // sampler.window)
    synchronize(session.device)
    start = time.perf_counter()
    state: State | MaskedState = sampler.begin(session, target, noise)
    passes = 0
    while True:
        sampler.step(session, state)
        passes += 1
        if callback is not None and passes % every == 0:
            callback(passes, state.tokens[:, : session.length], session.lengths)
        if passes >= fewest and (passes - fewest) % every == 0 and bool((session.lengths >= session.length).all()):
            break
    synchronize(session.device)
    seconds = time.perf_counter() - start
    session.check()
    if session.drafter is not None:
        session.drafter.check()
    length = session.length
    return Decoded(state.tokens[:, :length].clone(), state.commit_pass[:, :length].clone(), passes, seconds)
