"""The loop that runs a sampler's steps until every row is done, and its result."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from visar.engine.graphs import Graph
from visar.engine.masked_session import MaskedSession
from visar.engine.rng import Noise
from visar.engine.session import Session
from visar.errors import VisarError
from visar.host import synchronize
from visar.kernels.derived import steady_weights
from visar.params import CONTINUOUS, DISCRETE


class Decoding(Protocol):
    """The state of a sampler, as far as the loop knows it: `tokens` and `commit_pass`, [B, N or more].

    If its passes may commit more tokens than its sampler's window, `width` is how many.
    """

    tokens: Tensor
    commit_pass: Tensor

    def broken(self) -> bool:
        """Whether something that is no distribution was sampled from."""
        ...

    def check(self) -> None:
        """Raise `VisarError` where `broken`."""
        ...


class Snapshot(NamedTuple):
    """The state of a decoding after `passes` in `seconds`: `tokens` [B, N, ...], drafts included; `commit_pass` [B, N],
    -1 where nothing is committed; `lengths` [B] committed. The tensors are not copies: the next pass changes them."""

    passes: int
    seconds: float
    tokens: Tensor
    commit_pass: Tensor
    lengths: Tensor


Callback = Callable[[Snapshot], None]


class Decoded(NamedTuple):
    """`tokens` [B, N], of masked models [B, N, d]; `commit_pass` [B, N], the pass that committed each; the number of
    `passes`; their `seconds`, without callbacks; of those, the `capture_seconds` of a CUDA graph; `bytes_read` of cache
    by the model and of cache and weights by a drafter, by count; `replays`, the passes that a graph ran."""

    tokens: Tensor
    commit_pass: Tensor
    passes: int
    seconds: float
    capture_seconds: float = 0.0
    bytes_read: int = 0
    replays: int = 0


@torch.inference_mode()
@steady_weights()
def decode(
    session: Session | MaskedSession,
    sampler: Any,
    target: Any,
    noise: Noise,
    callback: Callback | None = None,
    every: int | None = None,
    graph: Graph | None = None,
    waits: bool = True,
) -> Decoded:
    """Run `sampler` on a fresh session of its family; one that has decoded before, or in part, is a `VisarError`.

    After every `every` passes `callback` is called and the rows are checked for their end: by default after each pass
    on a CPU and after every fourth on a GPU, where reading the lengths makes the host wait. Callbacks are not in
    `seconds`; the host waits for the device around each, unless `waits` is false, and then `seconds` mean nothing. Idle
    passes at the end are counted. With a `graph` steps are captured; one captured before must be of this session,
    started again. No weight may change meanwhile. Raises `VisarError` if something that is no distribution was sampled
    from in any pass: every pass notes it on the device, and the host reads it where it waits anyway, and in any case
    before this returns.
    """
    _check(session, sampler, noise)
    every = every or (1 if session.device.type == "cpu" else 4)
    synchronize(session.device)
    start = time.perf_counter()
    state: Decoding = sampler.begin(session, target, noise)
    if graph is not None:
        state = graph.begin(state)
    in_raster = session.in_raster if isinstance(session, Session) else lambda values: values
    fewest = -(-session.length // max(sampler.window, getattr(state, "width", 1)))

    def step() -> None:
        sampler.step(session, state)

    passes, in_callbacks, waits_anyway = 0, 0.0, session.device.type == "cpu"
    while True:
        if graph is None:
            step()
        else:
            graph.step(step, lambda: _bytes_read(session))
        passes += 1
        ending = passes >= fewest and (passes - fewest) % every == 0
        told = callback is not None and passes % every == 0
        if (waits_anyway or ending or (told and waits)) and state.broken():
            break
        if callback is not None and told:
            if waits:
                synchronize(session.device)
            now, length = time.perf_counter(), session.length
            tokens, commits = in_raster(state.tokens[:, :length]), in_raster(state.commit_pass[:, :length])
            callback(Snapshot(passes, now - start - in_callbacks, tokens, commits, session.lengths))
            if waits:
                synchronize(session.device)
            in_callbacks += time.perf_counter() - now
        if ending or (session.watched and passes % every == 0):
            least = int(session.lengths.min())
            if least >= session.length:
                break
            if isinstance(session, Session) and session.watched and session.reached(least) and graph is not None:
                graph.forget()
    synchronize(session.device)
    seconds = time.perf_counter() - start - in_callbacks
    session.check()
    if session.drafter is not None:
        session.drafter.check()
    state.check()
    length = session.length
    tokens, commit_pass = (in_raster(found[:, :length]).clone() for found in (state.tokens, state.commit_pass))
    captured, replays, uncounted = (0.0, 0, 0) if graph is None else (graph.seconds, graph.replays, graph.uncounted)
    return Decoded(tokens, commit_pass, passes, seconds, captured, _bytes_read(session) + uncounted, replays)


def _check(session: Session | MaskedSession, sampler: Any, noise: Any) -> None:
    """Raise `VisarError` for what cannot be decoded, or would be decoded wrongly."""
    if not callable(getattr(sampler, "begin", None)):
        raise VisarError(f"decode takes a sampler such as get_sampler('scd'), not a {type(sampler).__name__}.")
    masked, continuous = isinstance(session, MaskedSession), getattr(sampler, "tokens", DISCRETE) == CONTINUOUS
    if masked != continuous:
        own, other = (CONTINUOUS, DISCRETE)[:: 1 if continuous else -1]
        raise VisarError(f"Sampler {sampler.name!r} is for {own} tokens, and those of this session are {other}.")
    if not isinstance(noise, Noise) or len(noise.images) != session.batch:
        found = f"of {len(noise.images)} rows" if isinstance(noise, Noise) else f"{type(noise).__name__}"
        raise VisarError(f"decode takes the Noise of {session.batch} rows, as the session has, not {found}.")
    if bool((session.lengths != getattr(session, "given", 0)).any()):
        raise VisarError("This session has decoded before; make a new one for each call of decode.")


def _bytes_read(session: Session | MaskedSession) -> int:
    """Bytes counted by the session and its drafter."""
    return getattr(session, "bytes_read", 0) + (0 if session.drafter is None else session.drafter.bytes_read)
