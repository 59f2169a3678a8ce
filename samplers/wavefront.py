"""Rows of an image decoded side by side, each a few tokens after the one above."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch

from visar.engine.layout import Layout
from visar.engine.rng import Noise, Purpose
from visar.engine.session import Session
from visar.errors import VisarError
from visar.samplers.base import State
from visar.samplers.distribution import Target
from visar.samplers.parameters import option
from visar.samplers.registry import Registered, register_sampler
from visar.samplers.verification import sample


class Turn(NamedTuple):
    """A pass: token `feeds[i]` is the input of position `positions[i]`; the first `new` of them are sampled."""

    feeds: tuple[int, ...]
    positions: tuple[int, ...]
    new: int


@dataclass
class WavefrontState(State):
    """`turn`: the passes so far, which the host counts, as the schedule is fixed."""

    turn: int = 0


@register_sampler("zipar", paper="He et al. 2024, arXiv:2412.04062", exact=False)
@dataclass(frozen=True)
class ZipAR(Registered):
    """ZipAR (He et al. 2024, arXiv:2412.04062): a row begins when the one above is `ahead` tokens ahead of it.

    Relaxed: a token is sampled from its distribution given what is there of the tokens before it. The first token of a
    row needs the last one of the row above, which is not there yet; the newest one of that row is used instead, and is
    replaced in the cache when the true one comes. With `ahead` as large as a row this is plain decoding.
    """

    ahead: int = option(8, "tokens that the row above is ahead", 1, 64)
    layout: Layout | None = field(default=None, compare=False)  # filled in by the model
    exact: ClassVar[bool] = False
    capturable: ClassVar[bool] = False  # the schedule runs on the host
    lockstep: ClassVar[bool] = True  # and is one for all rows
    scan: ClassVar[str] = "rows"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ahead < 1:
            raise VisarError(f"ahead must be 1 or more tokens, not {self.ahead}.")

    @property
    def size(self) -> tuple[int, int]:
        """Rows, and tokens in each, the one at its end included."""
        return (1, 1) if self.layout is None else (self.layout.rows, self.layout.stride)

    @property
    def lead(self) -> int:
        """Tokens before the first row, which are decoded one by one."""
        return 0 if self.layout is None else self.layout.lead

    @property
    def lag(self) -> int:
        """Passes between the first tokens of a row and the next."""
        return min(self.ahead, self.size[1])

    @property
    def window(self) -> int:
        """The most tokens that a pass may sample."""
        return min(self.size[0], -(-self.size[1] // self.lag))

    @cached_property
    def turns(self) -> list[Turn]:
        """The passes of an image; they are the same for every image."""
        (rows, size), lag = self.size, self.lag
        turns = [Turn((n - 1,), (n,), 1) for n in range(self.lead)]
        for now in range(size + (rows - 1) * lag):
            feeds, positions, late = [], [], []
            for row in range(rows):
                column = now - row * lag
                first = self.lead + row * size  # the position that begins a row
                if column == size and lag < size and row + 1 < rows:
                    late.append(first + size)  # a row is complete: its last token replaces the one used instead
                if not 0 <= column < size:
                    continue
                newest = first + column - 1 if column or lag == size or not row else first - size + lag - 1
                feeds.append(newest)
                positions.append(first + column)
            turns.append(Turn((*feeds, *(position - 1 for position in late)), (*positions, *late), len(positions)))
        return turns

    def reached(self, now: int) -> list[int]:
        """How many tokens each row has once the pass `now` is done; their positions are written by then, too."""
        rows, size = self.size
        return [min(max(now + 1 - self.lead - row * self.lag, 0), size) for row in range(rows)]

    def begin(self, session: Session, target: Target, noise: Noise) -> WavefrontState:
        if self.layout is None or self.layout.length != session.length:
            raise VisarError(f"zipar needs layout, the rows and columns of an image of {session.length} tokens.")
        return WavefrontState.empty(session, target, noise, self.window)

    def step(self, session: Session, state: WavefrontState) -> None:
        # The schedule is no matter of chance: the host knows it, and how far every row is.
        now, device = state.turn, session.device
        if now == len(self.turns):
            return  # all rows are done, and the host has not checked yet
        turn = self.turns[now]
        state.turn += 1
        positions = torch.tensor(turn.positions, device=device)
        column = torch.arange(self.size[1], device=device)
        before = torch.arange(self.lead, device=device) <= now
        written = torch.cat([before, (column < torch.tensor(self.reached(now), device=device)[:, None]).flatten()])
        feeds = torch.tensor(turn.feeds, device=device).clamp_min(0).expand(session.batch, -1)
        logits = session.forward_at(state.tokens.gather(1, feeds), positions, written)
        at = positions[: turn.new].expand(session.batch, -1)
        p = state.target.probs(logits[:, : turn.new], at)
        tokens = sample(p, state.noise.uniforms(Purpose.STEP, at, state.passes)[1])
        state.tokens.scatter_(1, at, tokens)
        state.commit_pass.scatter_(1, at, state.passes.expand_as(at))
        state.passes += 1
        done = min(now + 1, self.lead) + gapless(self.reached(now), self.size[1])
        session.commit(done - session.lengths)


def gapless(reached: list[int], size: int) -> int:
    """The tokens from the first on with none missing between them."""
    whole = 0
    for count in reached:
        whole += count
        if count < size:
            break
    return whole
