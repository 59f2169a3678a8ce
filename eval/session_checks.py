"""Plain checks of a Session against a law that is known for every prefix: each names one mistake of wrapping a model.

They come before the joint law of `visar.eval.own_model`, which would notice the same mistakes and could not name them.
No code of the samplers is used: tokens are fed and committed here by hand.
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
    """Sessions to be checked, made by `make`, and `table` [prefixes, V]: the law after every prefix, in float64.

    The prefix (x_0..x_{L-1}) is row V**0 + .. + V**(L-1) + its value base V, as in `visar.eval.tabular.TabularModel`.
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
        """The laws [B, N, V] of the positions of sequences [B, N]."""
        rows, value, offset = [], torch.zeros(len(tokens), dtype=torch.long), 0
        for n in range(self.length):
            rows.append(offset + value)
            value, offset = value * self.vocab + tokens[:, n], offset + self.vocab**n
        return self.table[torch.stack(rows, 1)]


def laws(session: Session, tokens: Tensor, tree: Tree | None = None, first: int = 0) -> Tensor:
    """The laws [B, W, V] of one pass, float64 on the CPU; a `VisarError` where the pass gives none."""
    found = session.forward(tokens.to(session.device), None if tree is None else tree.to(session.device), first)
    shape = (*tokens.shape, session.vocab)
    if not isinstance(found, Tensor) or found.shape != shape or not found.is_floating_point():
        got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise VisarError(
            f"forward gave {got.removeprefix('torch.')} for tokens {list(tokens.shape)}; it must give logits [B, W, V] "
            f"of a floating dtype, here {list(shape)}."
        )
    return law_of(found, "forward")


def law_of(logits: Tensor, what: str) -> Tensor:
    """The law [B, W, V], float64 on the CPU, of logits; a `VisarError` if they are none."""
    law = logits.detach().cpu().double().softmax(-1)
    bad = torch.nonzero(~torch.isfinite(law).all(-1))
    if len(bad):
        row, token = bad[0].tolist()
        raise VisarError(
            f"{what} gave logits that are no law (NaN or infinite), first in row {row} at token {token} of "
            f"{law.shape[1]}; they must be numbers, behind the end of the sequence too."
        )
    return law


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
    """Commit the first tokens of every row one by one; the laws [B, steps, V] that the passes gave."""
    out = []
    for _ in range(steps):
        out.append(laws(session, inputs(session, tokens, 1))[:, 0])
        commit(session, torch.ones(session.batch, dtype=torch.long))
    return torch.stack(out, 1)


def far(found: Tensor, wanted: Tensor) -> Tensor:
    """The total variation between laws [..., V]: [...]."""
    return (found - wanted).abs().sum(-1) / 2


def ahead(subject: Subject, tokens: Tensor, lengths: Tensor, found: Tensor) -> Tensor:
    """How far the laws [B, W, V] of a pass behind `lengths` [B] are from those they should be; 0 past the end."""
    at = lengths[:, None] + torch.arange(found.shape[1])
    wanted = subject.along(tokens)
    rows = torch.arange(len(tokens))[:, None]
    return far(found, wanted[rows, at.clamp_max(subject.length - 1)]) * (at < subject.length)


def random_tokens(subject: Subject, seed: int, batch: int = ROWS) -> Tensor:
    """Sequences [batch, N + 8], with something to feed past the end."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(subject.vocab, (batch, subject.length + 8), generator=generator)


def worst(distance: Tensor, lengths: Tensor | int = 0) -> str:
    """Where a distance [B, W] of a pass behind `lengths` is largest, in words."""
    row, token = divmod(int(distance.argmax()), distance.shape[1])
    behind = lengths if isinstance(lengths, int) else int(lengths[row])
    return f"position {behind + token}: total variation {float(distance.max()):.2g}"


def condition_first(subject: Subject) -> str | None:
    """The token that is fed in the condition's place is ignored."""
    for window in (1, 3):
        tokens = random_tokens(subject, seed=1)[:, :window]
        other = torch.cat([(tokens[:, :1] + 1) % subject.vocab, tokens[:, 1:]], dim=1)
        one, two = (laws(subject.make(ROWS, window), fed) for fed in (tokens, other))
        distance = far(one, two)[:, : subject.length]
        if distance.max() > TOLERANCE:
            return (
                "While nothing is committed the first token fed is to be ignored: the condition stands in its place; "
                f"here laws depend on it ({worst(distance)})."
            )
    return None


def rows_apart(subject: Subject) -> str | None:
    """A row has the laws that it has alone."""
    tokens = random_tokens(subject, seed=2)
    together = walked(subject.make(ROWS, 1), tokens, subject.length)
    alone = torch.cat([walked(subject.make(1, 1), row[None], subject.length) for row in tokens])
    distance = far(together, alone)
    if distance.max() > TOLERANCE:
        return f"A row of the batch has other laws than alone: it sees the other rows ({worst(distance)})."
    return None


def as_reference(subject: Subject) -> str | None:
    """Passes of one token give the laws of the reference."""
    tokens = random_tokens(subject, seed=3)
    distance = far(walked(subject.make(ROWS, 1), tokens, subject.length), subject.along(tokens[:, : subject.length]))
    if distance[:, 0].max() > TOLERANCE:
        return (
            "The first law is not the reference's: is the condition fed in the first pass, or are positions off by "
            f"one? ({worst(distance[:, :1])})"
        )
    if distance.max() > TOLERANCE:
        return (
            "Passes of one token give other laws than the reference: are positions off by one, or keys and values not "
            f"written where they are read? ({worst(distance)})"
        )
    return None


def windows(subject: Subject) -> str | None:
    """A pass of W tokens gives the laws of W passes of one, wherever it begins."""
    for window in (2, 3, subject.length + 2):
        for behind in range(subject.length):
            tokens = random_tokens(subject, seed=4)

            def found(drafts: Tensor, behind: int = behind, window: int = window) -> Tensor:
                session = subject.make(ROWS, window)
                if behind:
                    walked(session, drafts, behind)
                return laws(session, inputs(session, drafts, window))

            given = found(tokens)
            distance = ahead(subject, tokens, torch.full((ROWS,), behind), given)
            if distance.max() <= TOLERANCE:
                continue
            for token in range(1, min(window, subject.length - behind)):  # does one before see the token fed here?
                other = tokens.clone()
                other[:, behind + token - 1] += 1
                if far(given, found(other % subject.vocab))[:, :token].max() > TOLERANCE:
                    return (
                        "A token of a pass sees tokens that are fed behind it: the causal mask of a pass of several "
                        f"tokens is wrong (W {window} behind {behind} tokens, {worst(distance, behind)})."
                    )
            return (
                f"A pass of {window} tokens gives other laws than {window} passes of one: does each token see what is "
                f"before it, at its own position? (behind {behind} tokens, {worst(distance, behind)})"
            )
    return None


def rollback(subject: Subject) -> str | None:
    """Drafts that were fed and not committed leave no trace."""
    for behind in range(subject.length - 1):
        for kept in range(min(2, subject.length - 1 - behind)):
            for window in (1, 2):  # of the passes that follow
                tokens = random_tokens(subject, seed=5)
                session = subject.make(ROWS, 4)
                if behind:
                    walked(session, tokens, behind)
                drafts = tokens.clone()
                drafts[:, behind + kept :] = (drafts[:, behind + kept :] + 1) % subject.vocab
                laws(session, inputs(session, drafts, 4))
                commit(session, torch.full((ROWS,), kept + 1))
                for at in range(behind + kept + 1, subject.length):
                    distance = ahead(
                        subject, tokens, session.lengths.cpu(), laws(session, inputs(session, tokens, window))
                    )
                    if distance.max() > TOLERANCE:
                        return (
                            "A draft that was rejected leaves a trace: a pass must overwrite what the cache holds from "
                            "the first slot it is fed on, and see nothing that lies behind its own tokens "
                            f"({worst(distance, at)})."
                        )
                    commit(session, torch.ones(ROWS, dtype=torch.long))
    return None


def own_pace(subject: Subject) -> str | None:
    """Rows that have committed unlike counts, and rows that are done, have the right laws."""
    tokens, generator = random_tokens(subject, seed=6), torch.Generator().manual_seed(7)
    for window in (1, 3):
        session = subject.make(ROWS, window)
        while int(session.lengths.min()) < subject.length:
            lengths = session.lengths.cpu()
            distance = ahead(subject, tokens, lengths, laws(session, inputs(session, tokens, window)))
            if distance.max() > TOLERANCE:
                return (
                    "Rows that have committed unlike counts get wrong laws: positions, masks and slots must come from "
                    f"`lengths` [B], row by row ({worst(distance, lengths)})."
                )
            count = torch.randint(0 if window == 1 else 1, window + 1, (ROWS,), generator=generator)
            commit(session, torch.minimum(count, subject.length - lengths))
    return None


def in_parts(subject: Subject) -> str | None:
    """A pass may be fed in parts (`first`) and after `lengths` was set back, as when the session drafts."""
    tokens = random_tokens(subject, seed=8)
    session = subject.make(ROWS, 5)
    walked(session, tokens, subject.length - 1)
    for behind in range(subject.length):
        session.lengths.fill_(behind)
        whole = inputs(session, tokens, 4)
        found = torch.cat([laws(session, whole[:, :2]), laws(session, whole[:, 2:], None, 2)], dim=1)
        distance = ahead(subject, tokens, session.lengths.cpu(), found)
        if distance[:, :2].max() > TOLERANCE:
            return (
                "After `lengths` was set back the laws are wrong: what a pass sees must follow from `lengths` alone, "
                f"or the session cannot draft for another ({worst(distance, behind)})."
            )
        if distance.max() > TOLERANCE:
            return (
                "A pass that is fed in parts gives other laws: with first > 0 the tokens stand behind those of the "
                f"passes before, at `follows(W, tree, first)` ({worst(distance, behind)})."
            )
    return None


def trees(subject: Subject) -> str | None:
    """The nodes of a tree see what is above them alone, and `keep` moves a path to the front."""
    tree = Tree.of([-1, 0, 0, 1, 2])
    paths = {0: [], 1: [1], 2: [2], 3: [1, 3], 4: [2, 4]}
    for behind in range(subject.length - 3):
        tokens = random_tokens(subject, seed=9)
        session = subject.make(ROWS, 5)
        if behind:
            walked(session, tokens, behind)
        drafts = random_tokens(subject, seed=10)[:, :5]
        drafts[:, 2] = (drafts[:, 1] + 1) % subject.vocab
        drafts[:, 0] = inputs(session, tokens, 1)[:, 0]
        found = laws(session, drafts, tree)
        for node, path in paths.items():
            branch = torch.cat([tokens[:, :behind], drafts[:, path], tokens[:, behind + len(path) :]], dim=1)
            distance = far(found[:, node], subject.along(branch)[:, behind + len(path)])
            if distance.max() > TOLERANCE:
                return (
                    "A node of a tree has another law than a chain of the same tokens: it sees the committed tokens "
                    f"and the nodes above it, at the position of its depth (node {node}, {float(distance.max()):.2g})."
                )
        session.keep(torch.tensor([2, 4], device=session.device).expand(ROWS, -1))
        commit(session, torch.full((ROWS,), 3))
        branch = torch.cat([tokens[:, :behind], drafts[:, [2, 4]], tokens[:, behind + 2 :]], dim=1)
        distance = ahead(subject, branch, session.lengths.cpu(), laws(session, inputs(session, branch, 1)))
        if distance.max() > TOLERANCE:
            return (
                "After keep(path) the laws are wrong: the path's nodes are to lie in the slots behind the root, first "
                f"read, then written ({worst(distance, behind + 3)})."
            )
    return None


Checking = Callable[[Subject], str | None]  # one sentence about a mistake, or None


def checks_of(subject: Subject) -> dict[str, Checking]:
    """The checks by name, in the order in which they mean something."""
    return {
        "condition comes first": condition_first,
        "rows are apart": rows_apart,
        **({"passes of one token": as_reference} if subject.by_reference else {}),
        "passes of W tokens": windows,
        "rejected drafts": rollback,
        "rows at their own pace": own_pace,
        "passes in parts": in_parts,
        **({"trees": trees} if subject.has_trees and subject.length > 3 else {}),
    }
