"""`visar verify --session`: checks your own model wrapped as a Session; see docs/own-model.md.

First the plain checks of `visar.eval.exactness.session_checks`, each of which names a mistake; where they pass, the
joint distribution of every exact sampler on this session, as in `visar.eval.exactness.joint`. The probabilities come
from a reference that knows nothing of sessions, a function over whole sequences, or without one from the session's
passes of one token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visar import user_code
from visar.engine.callable_session import Logits, of_positions
from visar.engine.drafter import SessionDrafter
from visar.engine.layout import Layout
from visar.engine.loop import Decoded, decode
from visar.engine.rng import Noise
from visar.engine.session import Session
from visar.engine.tree import Tree
from visar.errors import VisarError
from visar.eval.exactness.joint import (
    PLAIN,
    Case,
    Row,
    alike,
    check_exact,
    configured,
    exact_samplers,
    joint_z,
    sampled,
)
from visar.eval.exactness.session_checks import checks_of
from visar.eval.exactness.session_subject import TOLERANCE, Make, Subject, far, probs_of, walked
from visar.eval.exactness.tabular import TabularModel, joint
from visar.samplers import Sampler, Target, get_sampler, spec_of

MOST = 16384  # sequences that are counted one by one
LEAST_EFFECT = 0.02  # what the tokens before must change of a distribution, as total variation, for mistakes to show
BATCH = 4096


@dataclass(frozen=True)
class Check:
    """What a plain check found: `message` is empty where nothing is wrong."""

    check: str
    message: str

    @property
    def passed(self) -> bool:
        return not self.message


def checked(make: Callable[..., Any], name: str = "make") -> Make:
    """`make`, whose sessions are looked at as they come: a `VisarError` says what a session must be."""
    try:
        inspect.signature(make).bind(1, 1)
    except TypeError as error:
        raise VisarError(f"{name} must take two arguments, the batch size and the window, as in make(8, 3).") from error

    def made(batch: int, window: int) -> Session:
        session = make(batch, window)
        if not isinstance(session, Session):
            raise VisarError(f"{name} gave {type(session).__name__}, not a visar.engine.session.Session.")
        if not hasattr(session, "lengths"):
            raise VisarError(
                f"{name} gave a session whose __init__ did not call super().__init__(batch, length, vocab)."
            )
        if session.batch != batch:
            raise VisarError(f"{name}({batch}, {window}) gave a session of {session.batch} rows, not {batch}.")
        if session.lengths.shape != (batch,) or bool(session.lengths.any()):
            raise VisarError(f"{name} gave a session whose lengths are {session.lengths.tolist()}, not {batch} zeros.")
        return session

    return made


def subject_of(make: Make, reference: Logits | None) -> Subject:
    """What is checked, with the distribution of every prefix; a `VisarError` where it is too large, or says nothing."""
    first = make(1, 1)
    vocab, length = first.vocab, first.length
    if length < 3 or vocab < 2 or vocab**length > MOST:
        raise VisarError(
            f"The session has {length} tokens of {vocab} values; what can be counted has 3 tokens or more, of 2 values "
            f"or more, and at most {MOST} sequences, such as 5 tokens of 4 values: let make build a small model."
        )
    prefixes = torch.cartesian_prod(*[torch.arange(vocab)] * (length - 1))
    parts = []
    for part in prefixes.split(BATCH):
        if reference is None:
            parts.append(walked(make(len(part), 1), torch.cat([part, part[:, :1]], dim=1), length))
        else:
            logits = of_positions(reference(part.to(first.device)), (len(part), length, vocab))
            parts.append(probs_of(logits, "The reference"))
    every = torch.cat(parts)  # [V**(N-1), N, V]
    rows, effects = [], []
    for n in range(length):
        same = every[:, n].unflatten(0, (vocab**n, -1))  # those of one prefix next to one another
        if reference is not None and far(same, same[:, :1]).max() > TOLERANCE:
            raise VisarError(
                f"The reference's logits of position {n} depend on tokens from that position on; they must be causal."
            )
        rows.append(same[:, 0])
        effects.append(far(rows[-1], rows[-1].mean(0)).mean())
    if max(effects[1:]) < LEAST_EFFECT:
        raise VisarError(
            f"The distributions hardly depend on the tokens before (total variation {float(max(effects[1:])):.2g}, and "
            f"{LEAST_EFFECT:g} is the least), so no mistake would show; let make build a model of larger weights."
        )
    return Subject(make, vocab, length, torch.cat(rows), reference is not None)


class Flattened(Session):
    """Another distribution of the same session, so that its drafts are not always accepted."""

    def __init__(self, inner: Session):
        super().__init__(inner.batch, inner.length, inner.vocab, inner.device)
        self.inner, self.lengths = inner, inner.lengths

    def forward(self, tokens: Tensor, tree: Tree | None = None, first: int = 0) -> Tensor:
        return self.inner.forward(tokens, tree, first) / 2

    def keep(self, path: Tensor) -> None:
        self.inner.keep(path)


def decoded(subject: Subject, sampler: Sampler, images: Tensor, seed: int) -> Decoded:
    """Decode these image indices as one batch; a sampler that drafts does so with a session of the same kind."""
    session = subject.make(len(images), sampler.window)
    session.layout = session.layout or Layout(session.length, 1)  # for samplers that draft from the row above
    if hasattr(sampler, "drafter"):
        # The root of the drafter's own session is one node before that of the tree.
        session.drafter = SessionDrafter(Flattened(subject.make(len(images), sampler.window + 1)))
    return decode(session, sampler, Target(), Noise(seed, images.to(session.device)))


def joint_rows(subject: Subject, name: str, sequences: int, seed: int) -> Iterator[Row]:
    """The joint distribution of one sampler, with a window within the sequence and one beyond it where it has one."""
    probabilities = joint(_tabular(subject), PLAIN)
    made = get_sampler(name)
    before = None
    for window in (3, subject.length + 2):
        sampler = configured(made, Case("", window=window))
        if sampler == before:
            return
        before = sampler

        def decoding(images: Tensor, sampler: Sampler = sampler) -> Decoded:
            return decoded(subject, sampler, images, seed)

        count = 64 if name == "jacobi" else sequences
        tokens, speed = sampled(decoding, count, BATCH)
        if name == "jacobi":
            probs = subject.along(tokens)  # of tokens that are as likely either may be taken
            taken = probs.gather(-1, tokens[..., None])[..., 0]
            z = 0.0 if (taken > probs.amax(-1) - TOLERANCE).all() else float("inf")
        else:
            z = joint_z(tokens, subject.vocab, probabilities)
        yield Row(name, f"window {sampler.window}", "exact", count, z, speed, alike(decoding, tokens, images=32))


def _tabular(subject: Subject) -> TabularModel:
    logits = subject.table.log()
    return TabularModel(subject.vocab, subject.length, logits, logits)


def names_for(subject: Subject, names: Iterable[str] | None) -> list[str]:
    """The samplers to test: those asked for, or all kinds that this session serves."""
    if names is None:
        own = [name for name in exact_samplers() if not spec_of(name).drafter]
        return [*own, "speculative", *(["speculative-tree"] if subject.has_trees else [])]
    check_exact(names)
    return list(names)


@torch.inference_mode()
def verify_session(
    make: Callable[[int, int], Session],
    reference: Logits | None = None,
    names: Iterable[str] | None = None,
    sequences: int = 131072,
    seed: int = 0,
    report: Callable[[Check | Row], None] = lambda found: None,
) -> tuple[list[Check], list[Row]]:
    """Check the sessions of `make(batch, window)`; the joint distributions are tested once all plain checks pass.

    `reference(tokens [B, n]) -> [B, n + 1, V]` are the logits of the positions 0..n by the model itself. Raises
    `VisarError` for what is no session, one too large to count, and logits that are no distribution.
    """
    subject = subject_of(checked(make), reference)
    wanted = names_for(subject, names)
    checks: list[Check] = []
    for title, check in checks_of(subject).items():
        checks.append(Check(title, check(subject) or ""))
        report(checks[-1])
        if not checks[-1].passed:
            return checks, []
    rows = []
    for name in wanted:
        for row in joint_rows(subject, name, sequences, seed):
            rows.append(row)
            report(row)
    return checks, rows


def verify_files(session: str, reference: str | None, **settings: Any) -> tuple[list[Check], list[Row]]:
    """`verify_session` for functions given as `FILE.py:NAME`."""
    make, probs = function(session, "--session"), None if reference is None else function(reference, "--reference")
    with user_code.blamed():
        return verify_session(make, probs, **settings)


def function(spec: str, flag: str) -> Callable[..., Any]:
    """The function of a `FILE.py:NAME`; a `VisarError` where it is none."""
    found = user_code.load(spec, flag)
    if not callable(found):
        raise VisarError(f"{spec.rpartition(':')[0]} has something that is no function {spec.rpartition(':')[2]!r}.")
    return found
