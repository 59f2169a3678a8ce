"""The session of a masked model: continuous tokens, sampled in any order."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from visar.engine.denoising import Denoiser
from visar.engine.layout import Layout
from visar.engine.rng import check_length
from visar.host import synchronize


class MaskedSession(ABC):
    """A batch of B images of `length` tokens of `dim` numbers; row b has sampled the first `lengths[b]` of its order.

    `order` [B, N] lists each row's positions in the order of sampling; the tokens `given` [B, m, d] of the first m are
    known from the start. `start` [B, N, d] holds them, and 0 elsewhere. `layout`, where there is one, is that of the
    positions. A subclass gives the head's `context` and the head. `denoisers` are those made so far, with their counts;
    `passes`, and `tested` and `accepted` drafts, are counted too.
    """

    drafter: None = None  # the loop asks every session
    watched = False
    layout: Layout | None = None

    def __init__(self, order: Tensor, dim: int, given: Tensor | None = None):
        self.order = order
        self.batch, self.length = order.shape
        check_length(self.length)
        self.dim, self.device = dim, order.device
        self.given = 0 if given is None else given.shape[1]
        self.start = torch.zeros(self.batch, self.length, dim, device=order.device)
        if given is not None:
            self.start.scatter_(1, order[:, : self.given, None].expand_as(given), given.to(self.start))
        self.lengths = torch.full((self.batch,), self.given, dtype=torch.long, device=order.device)
        self.draft: MaskedSession | None = None  # for samplers that draft with a smaller model
        self.denoisers: list[Denoiser] = []
        self.tested = self.accepted = 0
        self.draft_seconds, self.draft_passes = 0.0, 0
        self.passes = 0

    @abstractmethod
    def context(
        self, tokens: Tensor, rows: Tensor, known: Tensor, ask: Tensor, total: Tensor, valid: Tensor | None = None
    ) -> Tensor:
        """A pass: the head's conditions [G, n, K] for the tokens at the positions `ask` [G, n].

        `tokens` [G, N, d] are known at the positions `known` [G, m] where `valid` [G, m]; `rows` [G] are their rows of
        the batch. `total` [G, n] is the number of known tokens after this step, on which guidance may depend.
        """

    def after(self, tokens: Tensor, rows: Tensor, count: Tensor, ask: Tensor, total: Tensor) -> Tensor:
        """`context` for rows [G] of which the first `count` [G] of their order are known.

        `total` is at most N - 1, as in the reference.
        """
        most = int(count.max())
        known = self.order[rows, :most]
        valid = torch.arange(most, device=count.device) < count[:, None]
        every = None if bool(valid.all()) else valid
        return self.context(tokens, rows, known, ask, total.clamp(max=self.length - 1), every)

    @abstractmethod
    def make_denoiser(self, steps: int, temperature: float, latest: int, last_noise: bool) -> Denoiser:
        """The head with `steps` steps; `latest` is the noisiest training step used, 0 for the model's own."""

    def denoiser(self, steps: int, temperature: float = 1.0, latest: int = 0, last_noise: bool = False) -> Denoiser:
        """As `make_denoiser`, and adds it to `denoisers`."""
        made = self.make_denoiser(steps, temperature, latest, last_noise)
        self.denoisers.append(made)
        return made

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """Counts the block, a pass of a draft model, in `draft_passes` and its time in `draft_seconds`."""
        synchronize(self.device)
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self.draft_seconds += time.perf_counter() - start
        self.draft_passes += 1

    def commit(self, count: Tensor | int) -> None:
        """Row b has sampled `count[b]` more tokens."""
        self.lengths = self.lengths + count

    def check(self) -> None:  # noqa: B027 (a session may have nothing to check)
        """Called after the last pass; the caller checks the tokens."""
