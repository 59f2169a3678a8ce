"""The session of a masked model: images whose continuous tokens are decided in an order of their own."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from visar.engine.chain import Chain
from visar.host import synchronize


class MaskedSession(ABC):
    """A batch of B images of `length` tokens of `dim` numbers; row b has decided the first `lengths[b]` of its order.

    `order` [B, N] lists the places of each row as they are decided; the tokens `given` [B, m, d] of the first m of them
    are there from the start. `start` [B, N, d] holds them, and 0 elsewhere.
    A subclass gives what the head is told of a place, and the head. `chains` are those made so far, for what they
    counted; `passes`, and `tested` and `accepted` drafts, are counted too.
    """

    drafter: None = None  # the loop asks every session
    watched = False

    def __init__(self, order: Tensor, dim: int, given: Tensor | None = None):
        self.order = order
        self.batch, self.length = order.shape
        self.dim, self.device = dim, order.device
        self.given = 0 if given is None else given.shape[1]
        self.start = torch.zeros(self.batch, self.length, dim, device=order.device)
        if given is not None:
            self.start.scatter_(1, order[:, : self.given, None].expand_as(given), given.to(self.start))
        self.lengths = torch.full((self.batch,), self.given, dtype=torch.long, device=order.device)
        self.draft: MaskedSession | None = None  # for samplers that draft with a smaller model
        self.chains: list[Chain] = []
        self.tested = self.accepted = 0
        self.draft_seconds = 0.0
        self.passes = 0

    @abstractmethod
    def context(
        self, tokens: Tensor, rows: Tensor, known: Tensor, ask: Tensor, decided: Tensor, valid: Tensor | None = None
    ) -> Tensor:
        """A pass: what the head needs to know, [G, n, K], to draw the tokens at the places `ask` [G, n].

        `tokens` [G, N, d], of which those at the places `known` [G, m] are given, as far as `valid` [G, m]; `rows` [G]
        are the rows of the batch that they belong to. `decided` [G, n] is the number of tokens that there will be with
        those of the same step, by which guidance may go.
        """

    def after(self, tokens: Tensor, rows: Tensor, count: Tensor, ask: Tensor, decided: Tensor) -> Tensor:
        """`context` for rows [G] that have decided the first `count` [G] of their order, one more or less than others.

        `decided` is cut to N - 1, as the reference never counts all.
        """
        most = int(count.max())
        known = self.order[rows, :most]
        valid = torch.arange(most, device=count.device) < count[:, None]
        every = None if bool(valid.all()) else valid
        return self.context(tokens, rows, known, ask, decided.clamp(max=self.length - 1), every)

    @abstractmethod
    def make_chain(self, steps: int, temperature: float, latest: int, last_noise: bool) -> Chain:
        """The head as a chain of `steps` steps; `latest` is the noisiest training step used, 0 for the usual."""

    def chain(self, steps: int, temperature: float = 1.0, latest: int = 0, last_noise: bool = False) -> Chain:
        """As `make_chain`, counted."""
        made = self.make_chain(steps, temperature, latest, last_noise)
        self.chains.append(made)
        return made

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """Around what a draft model does: its time goes to `draft_seconds`."""
        synchronize(self.device)
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self.draft_seconds += time.perf_counter() - start

    def commit(self, count: Tensor | int) -> None:
        """Row b has decided `count[b]` more."""
        self.lengths = self.lengths + count

    def check(self) -> None:  # noqa: B027 (a session may have nothing to check)
        """The loop asks after the last pass. Nothing is kept between passes; the tokens themselves tell."""
