"""A Session under test, the distribution that is known for every prefix, and passes of it fed and committed by hand.

What `visar.eval.exactness.session_checks` is made of. No code of the samplers is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from visar.engine.session import Session
from visar.engine.tree import Tree
from visar.errors import VisarError

TOLERANCE = 1e-3  # total variation; the arithmetic of fp32 gives 1e-6
ROWS = 16

Make = Callable[[int, int], Session]  # of a batch size and a window


@dataclass(frozen=True)
class Subject:
    """Sessions to be checked, made by `make`, and `table` [prefixes, V]: the distribution after every prefix, in
    float64.

    The prefix (x_0..x_{L-1}) is row V**0 + .. + V**(L-1) + its value base V, as in
    `visar.eval.exactness.tabular.TabularModel`.
    """

    make: Make
    vocab: int
    length: int
    table: Tensor
    by_reference: bool = False  # whether the table comes from another source than the session's passes of one token

    @property
    def has_trees(self) -> bool:
        return type(self.make(1, 1)).keep is not Session.keep

    def along(self, tokens: Tensor) -> Tensor:
        """The distributions [B, N, V] of the positions of sequences [B, N]."""
        rows, value, offset = [], torch.zeros(len(tokens), dtype=torch.long), 0
        for n in range(self.length):
            rows.append(offset + value)
            value, offset = value * self.vocab + tokens[:, n], offset + self.vocab**n
        return self.table[torch.stack(rows, 1)]


def probs(session: Session, tokens: Tensor, tree: Tree | None = None, first: int = 0) -> Tensor:
    """The distributions [B, W, V] of one pass, float64 on the CPU; a `VisarError` where the pass gives none."""
    found = session.forward(tokens.to(session.device), None if tree is None else tree.to(session.device), first)
    shape = (*tokens.shape, session.vocab)
    if not isinstance(found, Tensor) or found.shape != shape or not found.is_floating_point():
        got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise VisarError(
            f"forward gave {got.removeprefix('torch.')} for tokens {list(tokens.shape)}; it must give logits [B, W, V] "
            f"of a floating dtype, here {list(shape)}."
        )
    return probs_of(found, "forward")


def probs_of(logits: Tensor, what: str) -> Tensor:
    """The distribution [B, W, V], float64 on the CPU, of logits; a `VisarError` if they are none."""
    probs = logits.detach().cpu().double().softmax(-1)
    bad = torch.nonzero(~torch.isfinite(probs).all(-1))
    if len(bad):
        row, token = bad[0].tolist()
        raise VisarError(
            f"{what} gave logits that are no distribution (NaN or infinite), first in row {row} at token {token} of "
            f"{probs.shape[1]}; they must be numbers, after the end of the sequence too."
        )
    return probs


def commit(session: Session, count: Tensor) -> None:
    """Commit `count` [B] tokens per row; a `VisarError` if the lengths do not follow."""
    wanted = session.lengths.cpu() + count
    session.commit(count.to(session.device))
    if not torch.equal(session.lengths.cpu(), wanted):
        raise VisarError(
            f"After commit({count.tolist()}) the lengths are {session.lengths.tolist()} and not {wanted.tolist()}; "
            "commit adds the counts to `lengths` [B]."
        )


def inputs(session: Session, tokens: Tensor, window: int) -> Tensor:
    """What a pass of `window` tokens is fed when row b goes on with `tokens` [B, N + W]: [B, W]."""
    at = session.lengths.cpu()[:, None] + torch.arange(-1, window - 1)
    return tokens.gather(1, at.clamp_min(0))


def walked(session: Session, tokens: Tensor, steps: int) -> Tensor:
    """Commit the first tokens of every row one by one; the distributions [B, steps, V] that the passes gave."""
    out = []
    for _ in range(steps):
        out.append(probs(session, inputs(session, tokens, 1))[:, 0])
        commit(session, torch.ones(session.batch, dtype=torch.long))
    return torch.stack(out, 1)


def far(found: Tensor, wanted: Tensor) -> Tensor:
    """The total variation between distributions [..., V]: [...]."""
    return (found - wanted).abs().sum(-1) / 2


def ahead(subject: Subject, tokens: Tensor, lengths: Tensor, found: Tensor) -> Tensor:
    """How far the probabilities [B, W, V] of a pass after `lengths` [B] are from what is right; 0 past the end."""
    at = lengths[:, None] + torch.arange(found.shape[1])
    wanted = subject.along(tokens)
    rows = torch.arange(len(tokens))[:, None]
    return far(found, wanted[rows, at.clamp_max(subject.length - 1)]) * (at < subject.length)


def random_tokens(subject: Subject, seed: int, batch: int = ROWS) -> Tensor:
    """Sequences [batch, 2N]: the longest window, N + 2 tokens after N - 1, reaches that far past the end."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(subject.vocab, (batch, 2 * subject.length), generator=generator)


def worst(distance: Tensor, lengths: Tensor | int = 0) -> str:
    """Where a distance [B, W] of a pass after `lengths` is largest, in words."""
    row, token = divmod(int(distance.argmax()), distance.shape[1])
    committed = lengths if isinstance(lengths, int) else int(lengths[row])
    return f"position {committed + token}: total variation {float(distance.max()):.2g}"
