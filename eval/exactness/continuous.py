"""The exactness proof for continuous tokens: the joint distribution of whole images on models where it is Gaussian and
known.

The distribution comes from `visar.eval.exactness.linear_gaussian`, which shares no code with the engine; its test is
`normality_z` of the whitened images. A distribution of each token alone would not do: a sampler that ignores the tokens
before passes that.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from visar.engine.loop import Decoded, decode
from visar.engine.masked_session import MaskedSession
from visar.engine.rng import Noise
from visar.errors import VisarError
from visar.eval.exactness.continuous_mutants import MUTANTS
from visar.eval.exactness.joint import Row
from visar.eval.exactness.linear_gaussian import NARROW, WIDE, GaussianDistribution, Setting, World
from visar.eval.exactness.normality import divergence, normality_z
from visar.samplers import (
    ContinuousSpeculative,
    ContinuousTarget,
    HeadSpeculation,
    check_sampler,
    get_sampler,
    samplers_for,
)

MUTANT_IMAGES = 16384
SAME = (
    0.02  # standard deviations by which other matrix shapes may move a token; another test result moves it by about one
)


@dataclass(frozen=True)
class Case:
    """A model and the way to decode it. `only` names the samplers it is for: "mar", "head", "draft", or all ("").

    `passes` is not for samplers with a draft model, which is the target `disturbed` by so much; `same_last` gives it
    the target's variance in the last step. `window` is of drafted head steps, `gamma` of drafted tokens. `unit` is the
    width of tokens; 0 chooses it. `swing` moves the variance from one head step to the next.
    """

    name: str
    only: str = ""
    tokens: int = 6
    passes: int = 4
    head_steps: int = 8
    latest: int = 0
    temperature: float = 1.0
    scale: float = 1.0
    guidance: str = "linear"
    given: int = 0
    orders: int = 1
    head: str = "diffusion"
    swing: float = 0.0
    unit: float = 0.0
    last_noise: bool = False
    window: int = 4
    adaptive: bool = True
    gamma: int = 3
    prefill: float = 0.0
    disturbed: float = 1.0
    same_last: bool = False

    def fits(self, sampler: Any) -> bool:
        """Whether the case has something to say of the sampler."""
        drafts = isinstance(sampler, ContinuousSpeculative)
        kinds = {"draft"} if drafts else {"mar", "head"} if isinstance(sampler, HeadSpeculation) else {"mar"}
        return not self.only or self.only in kinds

    def setting(self, sampler: Any) -> Setting:
        """What the sampler's distribution depends on here. One with a draft model samples a token in each pass."""
        drafts = isinstance(sampler, ContinuousSpeculative)
        passes = self.tokens - self.given if drafts else self.passes
        last_noise = drafts or self.last_noise
        return Setting(
            passes, self.head_steps, self.temperature, self.scale, self.guidance, last_noise, self.head,
            self.latest or 999,
        )  # fmt: skip


PLAIN = Case("plain")
CASES = (
    PLAIN,
    Case("temperature 0.7, T 6", head_steps=6, temperature=0.7),
    Case("temperature 1.3", temperature=1.3),
    Case("guidance 2.5, linear", scale=2.5),
    Case("guidance 2.5, constant", scale=2.5, guidance="constant", head_steps=12),
    Case("given tokens", given=2, passes=3),
    Case("8 orders, 2 conditions", orders=8, scale=1.5),
    Case("one token per pass", "mar", passes=6),
    Case("one pass", "mar", passes=1),
    Case("T 30, from step 900", "mar", head_steps=30, latest=900),
    Case("noise in the last step", "mar", last_noise=True),
    Case("moving variance", "mar", swing=0.6, unit=0.1, window=8, adaptive=False),
    Case("flow head", "mar", head="flow", scale=2.0),
    Case("L 3, T 8", "head", window=3, adaptive=False),
    Case("L 5, T 12", "head", window=5, adaptive=False, head_steps=12),
    Case("L 16 > T", "head", window=16, adaptive=False),
    Case("flow head, L 5", "head", head="flow", head_steps=12, window=5, adaptive=False),
    Case("gamma 1", "draft", gamma=1),
    Case("gamma 8 > N", "draft", gamma=8),
    Case("one last variance", "draft", same_last=True),
    Case("prefill 0.4", "draft", prefill=0.4),
    Case("draft of no use", "draft", disturbed=8.0),
    Case("draft = target", "draft", disturbed=0.0),
    Case("close draft", "draft", disturbed=0.05),
    Case(
        "all at once", tokens=8, passes=3, head_steps=10, temperature=0.8, scale=1.8, given=1, orders=4, swing=0.4,
        window=3, gamma=4, disturbed=0.6, prefill=0.2,
    ),
)  # fmt: skip
RELAXED_CASES = ("plain", "guidance 2.5, linear")


class Kind(NamedTuple):
    """What the images of a case take turns in: the order of the positions [N] and the condition."""

    order: np.ndarray[Any, np.dtype[np.int64]]
    condition: int


class Model(NamedTuple):
    world: World
    draft: World
    kinds: list[Kind]
    given: Tensor  # [m, d]


@cache
def build(case: Case, unit: float) -> Model:
    """The case's model with tokens of this width."""
    rng = np.random.default_rng(5)
    world = World.random(case.tokens, unit=unit, swing=case.swing)
    draft = world.disturbed(unit, case.disturbed)
    if case.same_last:
        draft = replace(draft, final=world.final)
    kinds = [Kind(rng.permutation(case.tokens), i % 2) for i in range(case.orders)]
    return Model(world, draft, kinds, torch.tensor(rng.normal(size=(case.given, world.dim)) * 3 * unit).float())


def model_of(case: Case, sampler: Any) -> Model:
    """Where drafts are judged by the last step's density, tokens are as narrow as that; else they hardly show it."""
    return build(case, case.unit or (NARROW if isinstance(sampler, ContinuousSpeculative) else WIDE))


def configured(sampler: Any, case: Case) -> Any:
    """The sampler with the fields of the case that it has."""
    if isinstance(sampler, ContinuousSpeculative):
        return replace(sampler, gamma=case.gamma, head_steps=case.head_steps, latest=case.latest, prefill=case.prefill)
    wanted: dict[str, Any] = {"steps": case.passes, "head_steps": case.head_steps, "last_noise": case.last_noise}
    wanted["latest"] = case.latest or sampler.latest
    if sampler.last_head_steps:
        wanted["last_head_steps"] = case.head_steps // 2
    if isinstance(sampler, HeadSpeculation):
        wanted |= {"draft": case.window, "adaptive": case.adaptive}
    return replace(sampler, **wanted)


class Run(NamedTuple):
    """`decoded` [B, N, d], as standard normals [B, D] if the distribution is right, by the `session` that counted."""

    white: Tensor
    decoded: Decoded
    session: MaskedSession


def run(case: Case, sampler: Any, images: Tensor, seed: int) -> Run:
    """Decode the given image indices as one batch."""
    model, setting = model_of(case, sampler), case.setting(sampler)
    which = images % len(model.kinds)
    order = torch.tensor(np.stack([kind.order for kind in model.kinds]))[which]
    condition = torch.tensor([kind.condition for kind in model.kinds])[which]
    given = model.given.expand(len(images), -1, -1) if case.given else None
    session = model.world.session(setting, condition, order, given)
    if isinstance(sampler, ContinuousSpeculative):
        session.draft = model.draft.session(setting, condition, order, given)
    seed += zlib.crc32(case.name.encode())  # with one noise for all cases, their whitened images would be the same
    out = decode(session, sampler, ContinuousTarget(case.temperature), Noise(seed, images))
    free = order[:, case.given :]
    x = out.tokens.gather(1, free[..., None].expand(-1, -1, model.world.dim)).flatten(1).double()
    white = torch.empty_like(x)
    for i in which.unique().tolist():
        white[which == i] = torch.from_numpy(distribution(case, i, setting, model).whiten(x[which == i].numpy()))
    return Run(white, out, session)


def distribution(case: Case, kind: int, setting: Setting, model: Model) -> GaussianDistribution:
    order: np.ndarray[Any, Any] = model.kinds[kind].order
    condition = model.kinds[kind].condition
    return model.world.distribution(setting, order, condition, model.given.double().numpy())


class Measured(NamedTuple):
    """z of the joint distribution, tokens per pass of an image, the acceptance rate, and what they came from."""

    z: float
    tokens_per_pass: float
    acceptance: float | None
    white: Tensor
    commit_pass: Tensor


def measure(sampler: Any, case: Case, images: int, seed: int, batch: int = 8192) -> Measured:
    runs = [run(case, sampler, part, seed) for part in torch.arange(images).split(batch)]
    white, commit = (torch.cat(parts) for parts in zip(*((r.white, r.decoded.commit_pass) for r in runs), strict=True))
    tested, accepted = (sum(getattr(r.session, name) for r in runs) for name in ("tested", "accepted"))
    speed = (case.tokens - case.given) / (commit.amax(1) + 1).double().mean().item()
    z = normality_z(white, runs[0].decoded.tokens.shape[-1])
    return Measured(z, speed, accepted / tested if tested else None, white, commit)


def same_alone(sampler: Any, case: Case, measured: Measured, seed: int, images: int = 16) -> bool:
    """Whether image i is the same alone, in a batch of 8, and in the large batch that was measured.

    The same up to rounding (`SAME`), as matrix shapes differ, and with every token sampled in the same pass.
    """
    parts = [*torch.arange(images // 2).split(1), *torch.arange(images).split(8)]
    for part in parts:
        white, out, _ = run(case, sampler, part, seed)
        near = (white - measured.white[part]).abs().max() < SAME
        if not (near and torch.equal(out.commit_pass, measured.commit_pass[part])):
            return False
    return True


def distinct() -> list[str]:
    """The samplers of the table; of those that are one with other parameters only the first."""
    out: dict[Any, str] = {}
    for name in samplers_for("continuous"):
        out.setdefault(configured(get_sampler(name), PLAIN), name)
    return list(out.values())


def row_of(name: str, sampler: Any, case: Case, kind: str, images: int, seed: int) -> Row:
    sampler = configured(sampler, case)
    found = measure(sampler, case, images, seed)
    alone = kind != "exact" or same_alone(sampler, case, found, seed)
    distance = divergence(found.white) if kind == "relaxed" else None
    return Row(
        name, case.name, kind, images, found.z, found.tokens_per_pass, alone, acceptance=found.acceptance,
        distance=distance,
    )  # fmt: skip


def verify_continuous(
    names: list[str] | None = None,
    sequences: int = 32768,
    seed: int = 0,
    mutants: bool = True,
    report: Callable[[Row], None] = lambda row: None,
    cases: tuple[Case, ...] = CASES,
) -> list[Row]:
    """Test samplers of continuous tokens on every case, then known-bad samplers; `report` gets each row as it comes.

    Relaxed samplers are not judged: their rows say how far their distribution is from the one that they approximate, as
    the divergence of the fitted Gaussian in nats per image.
    """
    for name in names or ():
        check_sampler(get_sampler(name), "continuous")
    if sequences < 1024:
        raise VisarError(f"The test of a distribution needs 1024 images or more, not {sequences}.")

    def rows() -> Iterator[Row]:
        for name in names or distinct():
            sampler = get_sampler(name)
            for case in cases:
                if case.fits(sampler) and sampler.exact:
                    yield row_of(name, sampler, case, "exact", sequences, seed)
                elif case.name in RELAXED_CASES and not sampler.exact:
                    yield row_of(name, sampler, case, "relaxed", sequences, seed)
        if mutants:
            for mutant in MUTANTS:
                case = next(c for c in CASES if c.name == mutant.case)
                yield row_of(mutant.name, mutant.sampler, case, "mutant", max(sequences, MUTANT_IMAGES), seed)

    out = []
    for row in rows():
        report(row)
        out.append(row)
    return out
