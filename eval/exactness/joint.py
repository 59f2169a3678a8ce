"""The exactness proof: the joint distribution of a sampler's sequences on enumerable models, by a chi-square test.

A sampler that is exact at each position can still be wrong about the sequence (a token that depends on a later one, a
stale draft distribution), so the test is of the *joint* distribution over all V**N sequences. The expected
probabilities come from `visar.eval.exactness.tabular.joint`, which shares no code with the samplers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visar.engine.drafter import SessionDrafter
from visar.engine.guidance import Guidance
from visar.engine.layout import Layout
from visar.engine.loop import Decoded, decode
from visar.engine.rng import Noise
from visar.engine.session import Session
from visar.errors import VisarError
from visar.eval.exactness.any_order import AnyOrderModel, AnyOrderSession
from visar.eval.exactness.diagonal import DiagonalModel, DiagonalSession
from visar.eval.exactness.late_rows import decoded_late
from visar.eval.exactness.mutants import MUTANTS
from visar.eval.exactness.tabular import Settings, TabularModel, TabularSession, joint
from visar.samplers import (
    BeamTree,
    Diagonal,
    DynamicSpeculative,
    Jacobi,
    Sampler,
    Target,
    check_sampler,
    get_sampler,
    samplers_for,
    scan_of,
    values_of,
)

EXACT_LIMIT, MUTANT_LIMIT = 4.0, 10.0
MUTANT_SEQUENCES = 131072  # with fewer, a small bias is not yet beyond doubt

Model = TabularModel | DiagonalModel | AnyOrderModel
PLAIN = Settings()
# For rules that ask which tokens look alike, of length 1 as a tokenizer's.
CODEBOOK = torch.nn.functional.normalize(torch.randn(8, 3, generator=torch.Generator().manual_seed(5)), dim=-1)


@dataclass(frozen=True)
class Case:
    """A target distribution and the way to decode it. `init` and `window` are given to samplers that have them."""

    name: str
    settings: Settings = PLAIN
    model: str = "markov"
    vocab: int = 3
    length: int = 5
    window: int = 4
    init: str = "uniform"
    columns: int = 1
    order: tuple[int, ...] = ()  # of the cells, where it is not the raster's
    head: bool = False  # whether the drafter predicts what is accepted, for samplers that ask it

    @property
    def scan(self) -> str:
        """Of the samplers that it is for."""
        return {"diagonals": "diagonal", "any order": "any"}.get(self.model, "raster")

    @property
    def layout(self) -> Layout:
        return Layout(-(-self.length // self.columns), self.columns)

    def build(self) -> Model:
        if self.model == "any order":
            return AnyOrderModel.of(self.layout, self.vocab)
        if self.model == "diagonals":
            return DiagonalModel.of(self.layout, self.vocab)
        make = TabularModel.markov if self.model == "markov" else TabularModel.full_prefix
        return make(self.vocab, self.length, seed=7)


PLAIN_CASE = Case("plain")
FORCED = (-1, -1, 2, -1, 1)
CASES = (
    PLAIN_CASE,
    Case("full prefix", model="full", vocab=4, length=5),
    Case("temperature 0.6", Settings(temperature=0.6)),
    Case("top-k 2, V 5", Settings(top_k=2), vocab=5),
    Case("top-p 0.7", Settings(top_p=0.7), model="full", vocab=4),
    Case("guidance 2.5", Settings(scale=2.5)),
    Case("guidance interval", Settings(scale=2.5, interval=1), model="full"),
    Case("forced positions", Settings(forced=FORCED)),
    Case(
        "allowed tokens", Settings(temperature=1.3, top_p=0.9, forced=(-1, -1, 1, -1, -1, 1), allowed=(0, 2, 3)),
        vocab=4, length=6,
    ),
    Case("N 7, W 3", length=7, window=3),
    Case("N 5, W 8 > N", window=8),
    Case("init left", init="left", length=7, window=3),
    Case("init above, columns 2", init="above", columns=2, length=8),
    Case("init left-probs", init="left-probs", length=7, window=3),
    Case("init above-probs, columns 2", init="above-probs", columns=2, length=8, window=3),
    Case(
        "init mean-probs, columns 3", Settings(temperature=1.3, top_p=0.9, scale=1.8, forced=(-1, -1, 2, *[-1] * 4)),
        init="mean-probs", columns=3, length=7, window=3,
    ),
    Case("V 8, N 5, top-k 3", Settings(top_k=3), vocab=8, model="full"),
    Case(
        "all at once",
        Settings(temperature=1.4, top_k=3, top_p=0.8, scale=1.8, interval=2, forced=(-1, 0, -1, -1, 3, -1, -1)),
        model="full", vocab=4, length=7, window=5, init="left-probs",
    ),
    Case(
        "an order", Settings(temperature=1.3, top_p=0.9, scale=1.8, forced=(-1, -1, 2, -1, -1, 0)),
        model="full", vocab=4, length=6, columns=3, order=(4, 0, 2, 5, 1, 3),
    ),
    Case("an acceptance head", Settings(temperature=1.3, top_p=0.9, forced=(-1, -1, 2, -1, -1)), head=True),
    Case("an order, init left", length=7, window=3, columns=3, init="left", order=(4, 0, 6, 2, 5, 1, 3)),
    Case("an order, init left-probs", length=7, window=3, columns=3, init="left-probs", order=(4, 0, 6, 2, 5, 1, 3)),
)  # fmt: skip

GRID = Case("diagonals", model="diagonals", vocab=3, length=6, columns=3)
DIAGONAL_CASES = (
    GRID,
    replace(GRID, name="diagonals, 2 x 2, V 5", vocab=5, length=4, columns=2),
    replace(GRID, name="diagonals, 3 x 2", columns=2),
    replace(GRID, name="diagonals, T 0.6, top-k 2", settings=Settings(temperature=0.6, top_k=2)),
    replace(GRID, name="diagonals, top-p 0.7", settings=Settings(top_p=0.7)),
    replace(GRID, name="diagonals, guided", settings=Settings(scale=2.5)),
    replace(GRID, name="diagonals, interval 1", settings=Settings(scale=2.5, interval=1)),
    replace(GRID, name="diagonals, forced", settings=Settings(forced=(-1, -1, 2, -1, 1, -1), allowed=(0, 2))),
)
# Of known-bad samplers alone; good ones have an order that does not change.
ANY_ORDER = Case("any order", model="any order", vocab=3, length=4, columns=2)
ALL = (*CASES, *DIAGONAL_CASES, ANY_ORDER)


@dataclass(frozen=True)
class Row:
    """A line of the table. `alone`: whether rows decoded alone, in eights, and in slots that they come to at different
    times gave the same tokens as in the batch.

    `acceptance`: the acceptance rate, and `distance`: from the distribution of a relaxed sampler to the one that it
    approximates, where these are measured.
    """

    sampler: str
    case: str
    kind: str  # "exact", "mutant", or "relaxed", which is shown and not judged
    sequences: int
    z: float
    tokens_per_pass: float
    alone: bool
    acceptance: float | None = None
    distance: float | None = None

    @property
    def passed(self) -> bool:
        if self.kind == "relaxed":
            return True
        if self.kind == "exact":
            return abs(self.z) < EXACT_LIMIT and self.alone
        return abs(self.z) > MUTANT_LIMIT


def configured(sampler: Sampler, case: Case) -> Sampler:
    """The sampler with the window and init of the case, where it has such fields, and a tree of a few nodes."""
    wanted: dict[str, Any] = {"window": case.window, "gamma": case.window - 1, "init": case.init}
    has = values_of(sampler)
    if isinstance(sampler, BeamTree):  # small enough that drafts are left out
        wanted |= {"beam": min(sampler.beam, 3), "depth": min(sampler.depth, 3), "nodes": min(sampler.nodes, 12)}
    if isinstance(sampler, Diagonal):
        return replace(sampler, layout=case.layout)
    return replace(sampler, **{k: v for k, v in wanted.items() if k in has})  # type: ignore[type-var]


def run(model: Model, case: Case, sampler: Sampler, images: Tensor, seed: int) -> Decoded:
    """Decode the given image indices as one batch."""
    session = session_of(model, case, sampler, len(images), guidance_of(case))
    return decode(session, sampler, target_of(model, case), Noise(seed, images))


class Predicting(SessionDrafter):
    """A drafter with a head that goes by the draft and by its distribution, and is often wrong."""

    def chance(self, drafts: Tensor, q: Tensor) -> Tensor:
        return torch.where(drafts == 0, 0.3, 0.3 + 0.5 * q.amax(-1))


def session_of(model: Model, case: Case, sampler: Sampler, batch: int, guidance: Guidance) -> Session:
    """A session with the drafter that the sampler needs, which knows the model somewhat."""
    if isinstance(model, DiagonalModel):
        return DiagonalSession(model, batch, guidance)
    if isinstance(model, AnyOrderModel):
        return AnyOrderSession(model, batch, sampler.window)
    session = TabularSession(model, batch, sampler.window, guidance)
    session.codebook = CODEBOOK[: model.vocab]
    session.layout = case.layout
    if case.order:
        session.cells = torch.tensor(case.order).repeat(batch, 1)
    if hasattr(sampler, "drafter"):
        # The root of the drafter's own session is one node before that of the tree.
        drafter = Predicting if case.head else SessionDrafter
        session.drafter = drafter(TabularSession(model.disturbed(seed=99), batch, sampler.window + 1, guidance))
    return session


def guidance_of(case: Case) -> Guidance:
    return Guidance(case.settings.scale, case.settings.interval)


def target_of(model: Model, case: Case) -> Target:
    settings = case.settings
    forced = torch.tensor(settings.forced) if settings.forced else None
    allowed = torch.isin(torch.arange(model.vocab), torch.tensor(settings.allowed)) if settings.allowed else None
    return Target(settings.temperature, settings.top_k, settings.top_p, forced, allowed)


def values(tokens: Tensor, vocab: int) -> np.ndarray:
    """Sequences [B, N] as numbers base V, the order of `joint`."""
    return (tokens * vocab ** torch.arange(tokens.shape[1] - 1, -1, -1)).sum(1).numpy()


def chi_square_z(counts: np.ndarray, probabilities: np.ndarray, least: float = 5.0) -> float:
    """(chi2 - df) / sqrt(2 df) of counts against probabilities; rare cells are pooled, impossible ones stay empty."""
    total = counts.sum()
    if counts[probabilities == 0].any():
        return float("inf")
    order = np.argsort(-probabilities, kind="stable")
    expected, observed = probabilities[order] * total, counts[order]
    common = int((expected >= least).sum())
    if common < 2:
        return 0.0
    # The rare cells together, and the smallest common one with them if they are still too few.
    last = common if expected[common:].sum() >= least else common - 1
    expected = np.append(expected[:last], expected[last:].sum())
    observed = np.append(observed[:last], observed[last:].sum())
    df = len(expected) - 1
    return float((((observed - expected) ** 2 / expected).sum() - df) / np.sqrt(2 * df))


Decode = Callable[[Tensor], Decoded]  # decodes these image indices as one batch


def sampled(decoding: Decode, sequences: int, batch: int = 16384) -> tuple[Tensor, float]:
    """The tokens [sequences, N] of the images 0.., and their number over that of the rows' own passes."""
    parts, passes = [], 0
    for images in torch.arange(sequences).split(batch):
        out = decoding(images)
        parts.append(out.tokens.cpu())
        passes += int((out.commit_pass.amax(1) + 1).sum())
    tokens = torch.cat(parts)
    return tokens, tokens.numel() / passes


def joint_z(tokens: Tensor, vocab: int, probabilities: np.ndarray) -> float:
    """The chi-square z of sequences [B, N] against the probability of each, [V**N]."""
    return chi_square_z(np.bincount(values(tokens, vocab), minlength=len(probabilities)), probabilities)


def alike(decoding: Decode, tokens: Tensor, images: int = 64) -> bool:
    """Whether image i has the same tokens alone, in a batch of 8, and in the large batch that gave `tokens`.

    With this, the joint distribution measured on the large batch is the joint distribution of batch 1 and of batch 8,
    bit for bit.
    """
    singles = [decoding(torch.tensor([i])).tokens.cpu() for i in range(images // 2)]
    eights = [decoding(part).tokens.cpu() for part in torch.arange(images).split(8)]
    return bool((torch.cat(singles) == tokens[: images // 2]).all() and (torch.cat(eights) == tokens[:images]).all())


def measure(sampler: Sampler, case: Case, sequences: int, seed: int, batch: int = 16384) -> tuple[float, float, Tensor]:
    """The chi-square z of the joint distribution, the mean tokens per pass of a row, and the tokens [sequences, N]."""
    model = case.build()
    tokens, speed = sampled(lambda images: run(model, case, sampler, images, seed), sequences, batch)
    return joint_z(tokens, case.vocab, expected(case)), speed, tokens


def expected(case: Case) -> np.ndarray:
    """The probability of every sequence, [V**N]."""
    model, settings = case.build(), case.settings
    if not isinstance(model, TabularModel):
        return model.joint(settings)
    if not case.order:
        return joint(model, settings)
    forced = tuple(settings.forced[cell] for cell in case.order) if settings.forced else ()
    by_turn = joint(model, replace(settings, forced=forced)).reshape([case.vocab] * case.length)
    return by_turn.transpose(np.argsort(case.order)).reshape(-1)


def same_alone(sampler: Sampler, case: Case, tokens: Tensor, seed: int) -> bool:
    """`alike`, for a sampler on the model of a case, and in slots, unless its rows go in lockstep."""
    model = case.build()
    if not alike(lambda images: run(model, case, sampler, images, seed), tokens):
        return False
    if getattr(sampler, "lockstep", False):
        return True

    def make(batch: int, guidance: Guidance) -> Session:
        return session_of(model, case, sampler, batch, guidance)

    images = torch.arange(32)
    late = decoded_late(make, sampler, target_of(model, case), guidance_of(case), images, seed)
    return bool((late == tokens[: len(images)]).all())


def greedy_row(sampler: Sampler, case: Case, seed: int) -> Row:
    """A greedy sampler is exact when every sequence is the argmax sequence, found by brute force."""
    model = case.build()
    assert isinstance(model, TabularModel)
    sampler = configured(sampler, case)
    out = run(model, case, sampler, torch.arange(64), seed)
    best = int(expected(replace(case, settings=replace(case.settings, top_k=1, top_p=1.0))).argmax())
    right = bool((values(out.tokens, case.vocab) == best).all())
    alone = same_alone(sampler, case, out.tokens, seed)
    return Row(sampler.name, case.name, "exact", 64, 0.0 if right else float("inf"), case.length / out.passes, alone)


def distinct() -> list[str]:
    """The samplers in raster order that are not relaxed; all draft alike here, so of those with the same rules only the
    first."""
    out: dict[Sampler, str] = {}
    for name in exact_samplers():
        sampler = configured(get_sampler(name), PLAIN_CASE)
        out.setdefault(replace(sampler, drafter="model") if hasattr(sampler, "drafter") else sampler, name)  # type: ignore[type-var, call-arg]
    return list(out.values())


def exact_samplers(scan: str = "raster") -> list[str]:
    """The names of those that are not relaxed."""
    return [name for name, spec in samplers_for("discrete", scan).items() if spec.exactness != "relaxed"]


def check_exact(names: Iterable[str]) -> None:
    """A `VisarError` for what is no sampler of discrete tokens, by name or `FILE.py:NAME`, or says it is not exact."""
    for name in names:
        sampler = check_sampler(get_sampler(name), "discrete")
        if not sampler.exact and name not in exact_samplers():
            raise VisarError(
                f"{name!r} is relaxed: there is nothing to prove. Exact ones: {', '.join(exact_samplers())}."
            )


def rows_of(sampler: Sampler, sequences: int, seed: int, cases: Iterable[Case]) -> Iterator[Row]:
    for case in cases:
        if case.scan != scan_of(sampler):
            continue
        if case.init != "uniform" and not hasattr(sampler, "init"):
            continue  # it has no window to fill
        if case.head and not isinstance(sampler, DynamicSpeculative):
            continue
        if isinstance(sampler, Jacobi):
            yield greedy_row(sampler, case, seed)
            continue
        own = configured(sampler, case)
        z, speed, tokens = measure(own, case, sequences, seed)
        yield Row(sampler.name, case.name, "exact", sequences, z, speed, same_alone(own, case, tokens, seed))


def verify_sampler(
    sampler: Sampler, sequences: int = 131072, seed: int = 0, cases: tuple[Case, ...] = ALL
) -> list[Row]:
    """Test a sampler of discrete tokens, of one's own too, on every case as one that is exact."""
    return list(rows_of(check_sampler(sampler, "discrete"), sequences, seed, cases))


def verify(
    names: list[str] | None = None,
    sequences: int = 131072,
    seed: int = 0,
    mutants: bool = True,
    cases: tuple[Case, ...] = ALL,
    report: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Test samplers on every case, then known-bad samplers, which must fail; `report` gets each row as it comes."""
    check_exact(names or ())

    def rows() -> Iterator[Row]:
        for name in names or [*distinct(), *exact_samplers("diagonal")]:
            yield from rows_of(get_sampler(name), sequences, seed, cases)
        if mutants:
            for mutant in MUTANTS:
                case = next(c for c in ALL if c.name == mutant.case)
                enough = max(sequences, MUTANT_SEQUENCES)
                z, speed, _ = measure(configured(mutant.sampler, case), case, enough, seed)
                yield Row(mutant.name, case.name, "mutant", enough, z, speed, True)

    out = []
    for row in rows():
        report(row)
        out.append(row)
    return out
