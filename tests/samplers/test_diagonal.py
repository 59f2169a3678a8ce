"""`diagonal`: the joint distribution of a tiny model with two-way heads, and what the engine asks of a sampler."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.recording import Recorder
from tests.helpers.tiny import VQ
from tests.helpers.two_way import GRID, gpt, inputs, session
from visar.engine.diagonals import Diagonals, Neighbours
from visar.engine.graphs import Graph
from visar.engine.guidance import Guidance
from visar.engine.layout import Layout
from visar.engine.loop import decode
from visar.engine.rng import Noise
from visar.errors import VisarError
from visar.eval.exactness.joint import DIAGONAL_CASES, MUTANT_LIMIT, chi_square_z, configured, measure, values, verify
from visar.eval.exactness.late_rows import decoded_late
from visar.eval.exactness.mutants import MUTANTS
from visar.eval.exactness.on_model import verify_model
from visar.eval.exactness.tabular import Settings, TabularModel, TabularSession, reference_probs
from visar.families.llamagen.two_way import TwoWayLlamaGen
from visar.families.llamagen.two_way_session import TwoWaySession
from visar.families.llamagen.vq import VQModel
from visar.generation.model import ImageModel
from visar.pipelines import ClassToImagePipeline
from visar.samplers import SAMPLERS, Diagonal, Target, default_sampler, samplers_for

SQUARE = Layout(GRID, GRID)
SETTINGS = Settings(temperature=0.8, top_p=0.9, scale=2.0)
TARGET = Target(0.8, top_p=0.9)
SMALL = dict(vocab_size=4, grid=2, head=0.08)
IMAGES = 4096


# The distribution


@functools.cache
def small(kind: str) -> TwoWayLlamaGen:
    return gpt(kind, **SMALL)


def conditions(kind: str) -> tuple[Tensor, Tensor | None]:
    """Two conditions."""
    condition, mask, _ = inputs(kind)
    return condition[:2], None if mask is None else mask[:2]


@functools.cache
def expected(kind: str) -> np.ndarray:
    """The probability of every image of 2 x 2 tokens, [conditions, V**N], by whole sequences without a cache.

    The corner, then its two neighbours independently of one another, then the last cell given all three.
    """
    model, (condition, mask) = small(kind), conditions(kind)
    images = torch.cartesian_prod(*[torch.arange(4)] * 4)
    out = np.ones((len(condition), len(images)))
    for c in range(len(condition)):
        given = condition[c : c + 1].repeat_interleave(len(images), 0)
        own = None if mask is None else mask[c : c + 1].expand(len(images), -1)
        null = model.cls_embedding.null_like(given)
        cond, uncond = (model(x, images[:, :-1], own).double().numpy() for x in (given, null))
        for i, image in enumerate(images.tolist()):
            for n, token in enumerate(image):
                out[c, i] *= reference_probs(cond[i, n], uncond[i, n], n, SETTINGS)[token]
    return out


def joint_z(kind: str, made: type[TwoWaySession] = TwoWaySession) -> list[float]:
    condition, mask = conditions(kind)
    rows = torch.arange(IMAGES) % 2
    given = (condition[rows],) if mask is None else (condition[rows], mask[rows])
    s = made(small(kind), *given, length=4, window=2, guidance=Guidance(2.0))
    found = values(decode(s, Diagonal(Layout(2, 2)), TARGET, Noise(0, torch.arange(IMAGES))).tokens, 4)
    counts = [np.bincount(found[c::2], minlength=256) for c in range(2)]
    return [chi_square_z(n, p) for n, p in zip(counts, expected(kind), strict=True)]


@pytest.mark.parametrize("kind", ["text", "class"])
def test_joint_distribution(kind: str) -> None:
    p = expected(kind)
    assert p.sum(1) == pytest.approx([1, 1], abs=1e-9)
    assert p.max() < 0.3 and ((p > 1e-3).sum(1) > 40).all() and abs(p[0] - p[1]).sum() / 2 > 0.1
    assert all(abs(z) < 4 for z in joint_z(kind))


class RasterMask(TwoWaySession):
    """A cell attends to those before it in raster order only, as in the trunk: not to one below and left of it."""

    def mask(self, last: Tensor) -> Tensor:
        slot = self._slot[: len(self.when)]
        cells = self.diagonals.cells[last.clamp_min(0)].repeat(self.batches, 1) + self.prefix
        return (super().mask(last) & (slot <= cells[..., None]))[..., self.folded :]


class LateMask(TwoWaySession):
    """The cells of one diagonal do not attend to one another."""

    def mask(self, last: Tensor) -> Tensor:
        own = self.when[self.folded :] == last.repeat(self.batches)[:, None]
        return super().mask(last) & ~(own & (self.when[self.folded :] >= 0))[:, None]


class Swapped(TwoWayLlamaGen):
    """The gate weighs the other head."""

    def share(self, right: Tensor, below: Tensor) -> Tensor:
        return 1 - super().share(right, below)


class NoGate(TwoWayLlamaGen):
    """The mean of both heads."""

    def share(self, right: Tensor, below: Tensor) -> Tensor:
        return super().share(right, below) * 0 + 0.5


class OneHead(TwoWayLlamaGen):
    """A cell that has both neighbours is predicted from the left one alone."""

    def share(self, right: Tensor, below: Tensor) -> Tensor:
        return torch.ones_like(super().share(right, below))


class OtherNeighbour(TwoWayLlamaGen):
    """The head below reads the left neighbour."""

    def predicted(self, hidden: Tensor, at: Neighbours) -> Tensor:
        return super().predicted(hidden, at._replace(above=at.left))


def with_model(kind: type[TwoWayLlamaGen]) -> type[TwoWaySession]:
    class Mistaken(TwoWaySession):
        def __init__(self, model: TwoWayLlamaGen, *condition: Tensor, **settings: Any):
            other = kind(**model.config).eval()
            other.load_state_dict(model.state_dict())
            super().__init__(other, *condition, **settings)

    return Mistaken


@pytest.mark.parametrize(
    "mistake", [RasterMask, LateMask, *map(with_model, (Swapped, NoGate, OneHead, OtherNeighbour))]
)
def test_mistakes_of_a_model_are_caught(mistake: type[TwoWaySession]) -> None:
    assert max(joint_z("class", mistake)) > MUTANT_LIMIT


def test_joint_distribution_on_tables() -> None:
    """With every setting, on models that are no network, also as `visar verify` runs it."""
    rows = verify(["diagonal"], 8192, mutants=False, cases=DIAGONAL_CASES[::2])
    assert len(rows) == 4 and not [row for row in rows if not row.passed]
    assert rows[0].tokens_per_pass == 6 / 4  # of 2 x 3 tokens in 4 passes


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if isinstance(m.sampler, Diagonal)], ids=lambda m: m.name)
def test_known_bad_samplers_fail(mutant: Any) -> None:
    case = next(c for c in DIAGONAL_CASES if c.name == mutant.case)
    assert measure(configured(mutant.sampler, case), case, 4096, seed=0)[0] > MUTANT_LIMIT


# The engine


@pytest.mark.parametrize("kind", ["text", "class"])
def test_rows_do_not_depend_on_others(kind: str) -> None:
    """Alone, in a batch, and in slots that rows come to at different times."""
    model, (condition, mask, _) = gpt(kind), inputs(kind)
    whole = decode(session(model, kind, Guidance(2.0)), Diagonal(SQUARE), TARGET, Noise(1, torch.zeros(3)))
    assert whole.passes == 2 * GRID - 1 and int(whole.commit_pass.max()) == 2 * GRID - 2
    assert torch.equal(whole.commit_pass[0], Diagonals.of(SQUARE).when)
    for row in range(3):
        own = (condition[row : row + 1],) if mask is None else (condition[row : row + 1], mask[row : row + 1])

        def make(batch: int, guidance: Guidance, own: tuple[Tensor, ...] = own) -> TwoWaySession:
            given = [part.expand(batch, *part.shape[1:]) for part in own]
            return TwoWaySession(model, *given, length=GRID**2, window=GRID, guidance=guidance)

        alone = decode(make(1, Guidance(2.0)), Diagonal(SQUARE), TARGET, Noise(1, torch.zeros(1)))
        assert torch.equal(alone.tokens[0], whole.tokens[row])
        late = decoded_late(make, Diagonal(SQUARE), TARGET, Guidance(2.0), torch.tensor([0, 4, 0]), seed=1)
        assert torch.equal(late[0], whole.tokens[row]) and torch.equal(late[2], late[0])
        assert not torch.equal(late[1], late[0])


def test_passes_after_the_last_change_nothing() -> None:
    model, noise = gpt("text"), Noise(4, torch.arange(3))
    found, late = (decode(session(model, "text"), Diagonal(SQUARE), TARGET, noise, every=n) for n in (1, 9))
    assert late.passes > found.passes and torch.equal(late.tokens, found.tokens)


def test_what_is_forced_stays() -> None:
    forced = torch.full((GRID**2,), -1)
    forced[[0, 6, 15]] = 3
    found = decode(session(gpt("class"), "class"), Diagonal(SQUARE), Target(forced=forced), Noise(4, torch.arange(3)))
    assert bool((found.tokens[:, [0, 6, 15]] == 3).all()) and len(found.tokens.unique(dim=0)) == 3


@pytest.mark.parametrize("interval", [0, 2, 5])
def test_guidance_ends_with_a_diagonal(interval: int) -> None:
    """As released: a diagonal is guided while at most `interval` tokens came before it; then its batch is dropped."""
    model, (condition, _, _) = gpt("class"), inputs("class")
    s = session(model, "class", Guidance(2.0, interval))
    found = decode(s, Diagonal(SQUARE), Target(top_k=1), Noise(4, torch.arange(3)))
    assert s.batches == 1
    tokens, null = found.tokens[:, :-1], model.cls_embedding.null_like(condition)
    cond, uncond = model(condition, tokens), model(null, tokens)
    table = Diagonals.of(SQUARE)
    before = (table.count.cumsum(0) - table.count)[table.when]
    guided = torch.where((before <= interval)[:, None], uncond + 2 * (cond - uncond), cond)
    assert torch.equal(guided.argmax(-1), found.tokens)


def test_a_step_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, noise = gpt("text"), Noise(4, torch.arange(3))
    plain = decode(session(model, "text", Guidance(2.0)), Diagonal(SQUARE), TARGET, noise)
    graph = Graph(Recorder(monkeypatch))
    found = decode(session(model, "text", Guidance(2.0)), Diagonal(SQUARE), TARGET, noise, graph=graph)
    assert found.replays > 0 and torch.equal(found.tokens, plain.tokens)


# A loaded model


@pytest.fixture(scope="module")
def model() -> ImageModel:
    torch.manual_seed(1)
    made = ClassToImagePipeline(gpt=gpt("class"), vq=VQModel(**VQ).eval(), guidance_scale=2.0, top_k=0).image_model
    made.bar = {"disable": True}
    return made


def test_a_model_says_what_its_sampler_is(model: ImageModel) -> None:
    assert model.usable_samplers() == ["diagonal"] == list(samplers_for("discrete", "diagonal"))
    assert default_sampler("discrete", "diagonal") == "diagonal" and "diagonal" not in samplers_for("discrete")
    out = model.generate([1, 2], seed=3)
    stats = out.stats
    assert (stats.sampler, stats.nfe, stats.exact) == ("diagonal", 2 * GRID - 1, True) and out.images[0].size == (8, 8)
    assert stats.exactness == SAMPLERS["diagonal"].exactness
    assert stats.exactness == "exact for a two-way model, which is another model than its trunk"
    alone = model.generate([2], seed=3, first_image=0, output_type="tokens")
    assert torch.equal(alone.tokens[0], out.tokens[1])
    for sampler in ("scd", "zipar"):
        with pytest.raises(
            VisarError, match=r"(in raster order|rows side by side), and this model samples by diagonals.*diagonal\."
        ):
            model.generate([1], sampler=sampler)
    assert model.family.drafting is None
    with pytest.raises(VisarError, match="take no drafter"):
        model.load_drafter("eagle")


def test_verify_on_a_model(model: ImageModel) -> None:
    (row,) = verify_model(model, 3, tokens=16 * 128)
    assert row.passed and row.sampler == "diagonal" and row.tokens_per_pass == 16 / 7


def test_bad_input(class_pipe: ClassToImagePipeline) -> None:
    with pytest.raises(VisarError, match=r"'diagonal' samples by diagonals.*this model samples in raster"):
        class_pipe.image_model.generate([1], sampler="diagonal")
    tabular = TabularSession(TabularModel.markov(3, 4, seed=0), 1, 2)
    with pytest.raises(VisarError, match="TabularSession has no two-way heads"):
        decode(tabular, Diagonal(Layout(2, 2)), Target(), Noise(0, torch.arange(1)))
    for layout in (None, Layout(3, 3), Layout(2, 1, line_end=True), Layout(1, 3, lead=1)):
        with pytest.raises(VisarError, match="diagonal needs layout, the rows and columns of an image of 4 cells"):
            decode(tabular, Diagonal(layout), Target(), Noise(0, torch.arange(1)))
