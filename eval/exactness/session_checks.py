"""Plain checks of a Session against logits that are known for every prefix: each names one mistake of wrapping a
model.

They come before the joint distribution of `visar.eval.exactness.own_model`, which would notice the same mistakes and
could not name them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from visar.engine.tree import Tree
from visar.eval.exactness.session_subject import (
    ROWS,
    TOLERANCE,
    Subject,
    ahead,
    commit,
    far,
    inputs,
    probs,
    random_tokens,
    walked,
    worst,
)


def condition_first(subject: Subject) -> str | None:
    """The token that is fed at the condition's slot is ignored."""
    for window in (1, 3):
        tokens = random_tokens(subject, seed=1)[:, :window]
        other = torch.cat([(tokens[:, :1] + 1) % subject.vocab, tokens[:, 1:]], dim=1)
        one, two = (probs(subject.make(ROWS, window), fed) for fed in (tokens, other))
        distance = far(one, two)[:, : subject.length]
        if distance.max() > TOLERANCE:
            return (
                "While nothing is committed the first token fed is to be ignored: the condition is fed instead; "
                f"here logits depend on it ({worst(distance)})."
            )
    return None


def rows_apart(subject: Subject) -> str | None:
    """A row has the logits that it has alone."""
    tokens = random_tokens(subject, seed=2)
    together = walked(subject.make(ROWS, 1), tokens, subject.length)
    alone = torch.cat([walked(subject.make(1, 1), row[None], subject.length) for row in tokens])
    distance = far(together, alone)
    if distance.max() > TOLERANCE:
        return f"A row of the batch has other logits than alone: it depends on the other rows ({worst(distance)})."
    return None


def as_reference(subject: Subject) -> str | None:
    """Passes of one token give the logits of the reference."""
    tokens = random_tokens(subject, seed=3)
    distance = far(walked(subject.make(ROWS, 1), tokens, subject.length), subject.along(tokens[:, : subject.length]))
    if distance[:, 0].max() > TOLERANCE:
        return (
            "The first logits are not the reference's: is the condition fed in the first pass, or are positions off by "
            f"one? ({worst(distance[:, :1])})"
        )
    if distance.max() > TOLERANCE:
        return (
            "Passes of one token give other logits than the reference: are positions off by one, or keys and values "
            f"not written where they are read? ({worst(distance)})"
        )
    return None


def windows(subject: Subject) -> str | None:
    """A pass of W tokens gives the logits of W passes of one, wherever it begins."""
    for window in (2, 3, subject.length + 2):
        for committed in range(subject.length):
            tokens = random_tokens(subject, seed=4)

            def found(drafts: Tensor, committed: int = committed, window: int = window) -> Tensor:
                session = subject.make(ROWS, window)
                if committed:
                    walked(session, drafts, committed)
                return probs(session, inputs(session, drafts, window))

            given = found(tokens)
            distance = ahead(subject, tokens, torch.full((ROWS,), committed), given)
            if distance.max() <= TOLERANCE:
                continue
            for token in range(
                1, min(window, subject.length - committed)
            ):  # does one before attend to the token fed here?
                other = tokens.clone()
                other[:, committed + token - 1] += 1
                if far(given, found(other % subject.vocab))[:, :token].max() > TOLERANCE:
                    return (
                        "A token of a pass attends to tokens that are fed after it: the causal mask of a pass of "
                        f"several tokens is wrong (W {window} after {committed} tokens, {worst(distance, committed)})."
                    )
            return (
                f"A pass of {window} tokens gives other logits than {window} passes of one: does each token attend "
                "to the tokens before it, at its own position? "
                f"(after {committed} tokens, {worst(distance, committed)})"
            )
    return None


def rollback(subject: Subject) -> str | None:
    """Drafts that were fed and not committed leave no trace."""
    for committed in range(subject.length - 1):
        for accepted in range(min(2, subject.length - 1 - committed)):
            for window in (1, 2):  # of the passes that follow
                tokens = random_tokens(subject, seed=5)
                session = subject.make(ROWS, 4)
                if committed:
                    walked(session, tokens, committed)
                drafts = tokens.clone()
                drafts[:, committed + accepted :] = (drafts[:, committed + accepted :] + 1) % subject.vocab
                probs(session, inputs(session, drafts, 4))
                commit(session, torch.full((ROWS,), accepted + 1))
                for at in range(committed + accepted + 1, subject.length):
                    distance = ahead(
                        subject, tokens, session.lengths.cpu(), probs(session, inputs(session, tokens, window))
                    )
                    if distance.max() > TOLERANCE:
                        return (
                            "A draft that was rejected leaves a trace: a pass must overwrite what the cache holds from "
                            "the first slot it is fed on, and attend to nothing after its own tokens "
                            f"({worst(distance, at)})."
                        )
                    commit(session, torch.ones(ROWS, dtype=torch.long))
    return None


def own_pace(subject: Subject) -> str | None:
    """Rows that have committed unlike counts, and rows that are done, have the right logits."""
    tokens, generator = random_tokens(subject, seed=6), torch.Generator().manual_seed(7)
    for window in (1, 3):
        session = subject.make(ROWS, window)
        while int(session.lengths.min()) < subject.length:
            lengths = session.lengths.cpu()
            distance = ahead(subject, tokens, lengths, probs(session, inputs(session, tokens, window)))
            if distance.max() > TOLERANCE:
                return (
                    "Rows that have committed unlike counts get wrong logits: positions, masks and slots must come "
                    f"from `lengths` [B], row by row ({worst(distance, lengths)})."
                )
            count = torch.randint(0 if window == 1 else 1, window + 1, (ROWS,), generator=generator)
            commit(session, torch.minimum(count, subject.length - lengths))
    return None


def in_parts(subject: Subject) -> str | None:
    """A pass may be fed in parts (`first`) and after `lengths` was set back, as when the session drafts."""
    tokens = random_tokens(subject, seed=8)
    session = subject.make(ROWS, 5)
    walked(session, tokens, subject.length - 1)
    for committed in range(subject.length):
        session.lengths.fill_(committed)
        whole = inputs(session, tokens, 4)
        found = torch.cat([probs(session, whole[:, :2]), probs(session, whole[:, 2:], None, 2)], dim=1)
        distance = ahead(subject, tokens, session.lengths.cpu(), found)
        if distance[:, :2].max() > TOLERANCE:
            return (
                "After `lengths` was set back the logits are wrong: what a pass attends to must follow from `lengths` "
                f"alone, or the session cannot draft for another ({worst(distance, committed)})."
            )
        if distance.max() > TOLERANCE:
            return (
                "A pass that is fed in parts gives other logits: with first > 0 the tokens come after those of the "
                f"passes before, at `follows(W, tree, first)` ({worst(distance, committed)})."
            )
    return None


def trees(subject: Subject) -> str | None:
    """The nodes of a tree attend only to what is above them, and `keep` moves a path to the front."""
    tree = Tree.of([-1, 0, 0, 1, 2])
    paths = {0: [], 1: [1], 2: [2], 3: [1, 3], 4: [2, 4]}
    for committed in range(subject.length - 3):
        tokens = random_tokens(subject, seed=9)
        session = subject.make(ROWS, 5)
        if committed:
            walked(session, tokens, committed)
        drafts = random_tokens(subject, seed=10)[:, :5]
        drafts[:, 2] = (drafts[:, 1] + 1) % subject.vocab
        drafts[:, 0] = inputs(session, tokens, 1)[:, 0]
        found = probs(session, drafts, tree)
        for node, path in paths.items():
            branch = torch.cat([tokens[:, :committed], drafts[:, path], tokens[:, committed + len(path) :]], dim=1)
            distance = far(found[:, node], subject.along(branch)[:, committed + len(path)])
            if distance.max() > TOLERANCE:
                return (
                    "A node of a tree has other logits than a chain of the same tokens: it attends to the committed "
                    "tokens and the nodes above it, at the position of its depth "
                    f"(node {node}, {float(distance.max()):.2g})."
                )
        session.keep(torch.tensor([2, 4], device=session.device).expand(ROWS, -1))
        commit(session, torch.full((ROWS,), 3))
        branch = torch.cat([tokens[:, :committed], drafts[:, [2, 4]], tokens[:, committed + 2 :]], dim=1)
        distance = ahead(subject, branch, session.lengths.cpu(), probs(session, inputs(session, branch, 1)))
        if distance.max() > TOLERANCE:
            return (
                "After keep(path) the logits are wrong: the path's nodes are to lie in the slots after the root, "
                f"first read, then written ({worst(distance, committed + 3)})."
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
