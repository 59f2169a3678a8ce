"""Models that sample in any order: windows, exact sampling in a fixed order, rows of their own, and the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cli.test_commands import run as command
from tests.helpers.any_order import (
    CELLS,
    CLASSES,
    GRID,
    IDS,
    IMAGES,
    KINDS,
    LENGTH,
    VOCAB,
    expected,
    gpt,
    sampled,
    session,
    worst_z,
)
from tests.helpers.recording import Recorder
from tests.helpers.tiny import VQ
from visar.engine.graphs import Graph
from visar.engine.guidance import Guidance
from visar.engine.layout import Layout
from visar.engine.loop import decode
from visar.engine.rng import Noise
from visar.engine.tree import Tree
from visar.errors import VisarError
from visar.eval.exactness.joint import MUTANT_LIMIT
from visar.eval.exactness.late_rows import decoded_late
from visar.eval.exactness.on_model import verify_model
from visar.families.llamagen.lpd import LPD
from visar.families.llamagen.lpd_session import LPDSession
from visar.families.llamagen.randar import RandAR
from visar.families.llamagen.randar_session import AnyOrderSession, RandARSession
from visar.families.llamagen.vq import VQModel
from visar.generation.model import ImageModel
from visar.generation.pool import Pool, Request
from visar.params import ORDERS, SamplingParams
from visar.pipelines import ClassToImagePipeline
from visar.samplers import Parallel, SpeculativeJacobi, Target, get_sampler

of_every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("window", [1, 2, 5, 20])
@of_every_kind
def test_windows_equal_the_whole_sequence(kind: type[Any], window: int) -> None:
    """Ragged commits, wrong drafts first in every pass, passes in parts, and windows that run past the end."""
    expected, s, counts = gpt(kind)(CLASSES, IDS[:, :-1], None, CELLS), session(kind, window), torch.tensor([1, 2, 3])
    while (s.lengths < LENGTH).any():
        at = s.lengths.clone()
        right = IDS.gather(1, (at[:, None] - 1 + torch.arange(window)).clamp(0, LENGTH - 1))
        s.forward(torch.cat([right[:, :1], (right[:, 1:] + 1) % VOCAB], dim=1))
        got = s.forward(right)
        if window > 2:
            parts = torch.cat([s.forward(right[:, :2]), s.forward(right[:, 2:], None, 2)], dim=1)
            torch.testing.assert_close(parts, got, rtol=0, atol=1e-5)
        for b, n in enumerate(at.tolist()):
            wanted = expected[b, n : n + window]
            torch.testing.assert_close(got[b, : len(wanted)], wanted, rtol=0, atol=1e-5)
        s.commit(torch.minimum(counts.clamp_max(window), LENGTH - at))
        counts = counts.roll(1)


# Exactness: images of four tokens of four values


SAMPLERS = [get_sampler("ar"), *(get_sampler(name, window=3) for name in ("sjd", "scd"))]
MORE = [get_sampler("scd", window=6), get_sampler("scd-gumbel", window=3), SpeculativeJacobi(3, "left-probs")]


@pytest.mark.parametrize("sampler", [*SAMPLERS, *(pytest.param(s, marks=pytest.mark.slow) for s in MORE)], ids=repr)
@of_every_kind
def test_joint_distribution(kind: type[Any], sampler: Any) -> None:
    """With a forced cell; four tokens are no multiple of a window of three, and the order is not the raster's."""
    wanted = expected(kind)
    assert wanted.sum(1) == pytest.approx([1, 1], abs=1e-9) and abs(wanted[0] - wanted[1]).sum() / 2 > 0.1
    tokens = sampled(kind, sampler, torch.arange(IMAGES))
    assert worst_z(kind, tokens) < 4
    pairs = [sampled(kind, sampler, pair) for pair in torch.arange(16).split(2)]  # what holds of many holds of two
    assert torch.equal(torch.cat(pairs), tokens[:16])


class OwnRow(RandARSession):
    """The token has the rotary row of the cell that is sampled next, not its own."""

    def rotary_rows(self, slots: Tensor) -> Tensor:
        return super().rotary_rows(slots + 1)


class NextPlace(LPDSession):
    """The token has the position of the cell that is sampled next, not its own."""

    def placed(self, x: Tensor, slots: Tensor) -> Tensor:
        return super().placed(x, slots + 1)


class SeenQueries(LPDSession):
    """Queries are seen by what comes after them, as RandAR's are."""

    def mask(self, slots: Tensor, first: int, visible: int) -> Any:
        return AnyOrderSession.mask(self, slots, first, visible)


class NoQuery(RandARSession):
    """All queries are alike."""

    def queries(self, slots: Tensor) -> Tensor:
        return super().queries(torch.zeros_like(slots))


class NotSorted(RandARSession):
    """The tokens stay in the order in which they were sampled."""

    def in_raster(self, values: Tensor, rows: slice = slice(None)) -> Tensor:
        return values


@pytest.mark.parametrize("mistake", [OwnRow, NextPlace, SeenQueries, NoQuery, NotSorted])
def test_mistakes_are_caught(mistake: type[AnyOrderSession]) -> None:
    kind = LPD if issubclass(mistake, LPDSession) else RandAR
    assert worst_z(kind, sampled(kind, SAMPLERS[2], torch.arange(IMAGES), mistake)) > MUTANT_LIMIT


# The engine


@pytest.mark.parametrize(
    "sampler", [get_sampler("scd", init="left"), Parallel(5, Layout(GRID, GRID))], ids=["scd", "parallel"]
)
@of_every_kind
def test_rows_do_not_depend_on_others(kind: type[Any], sampler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, in a batch, captured, and in slots that rows come to at different times, each in an order of its own."""
    forced = torch.full((LENGTH,), -1)
    forced[[1, 7]] = torch.tensor([5, 9])
    target, guidance = Target(0.9, 10, 0.95, forced), Guidance(2.0, -1, True)
    noise = Noise(1, torch.zeros(3))
    whole = decode(session(kind, 16, guidance), sampler, target, noise)
    graph = Graph(Recorder(monkeypatch))
    assert torch.equal(decode(session(kind, 16, guidance), sampler, target, noise, graph=graph).tokens, whole.tokens)
    assert (whole.tokens[:, [1, 7]] == torch.tensor([5, 9])).all() and graph.replays
    assert (whole.commit_pass.gather(1, CELLS).diff(dim=1) >= 0).all()
    for row in range(3):

        def make(batch: int, guided: Guidance, row: int = row) -> AnyOrderSession:
            own = CLASSES[row].expand(batch), CELLS[row].expand(batch, -1)
            made = KINDS[kind](gpt(kind), *own, length=LENGTH, window=16, grid=GRID, guidance=guided)
            made.layout = Layout(GRID, GRID)
            return made

        late = decoded_late(make, sampler, target, guidance, torch.tensor([0, 4, 0]), seed=1)
        assert torch.equal(late[[0, 2]], whole.tokens[row].expand(2, -1)) and not torch.equal(late[1], late[0])


# A loaded model


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("any") / "model"
    ClassToImagePipeline(gpt=gpt(request.param), vq=VQModel(**VQ).eval()).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> ImageModel:
    made = ImageModel.load(folder)
    made.bar = {"disable": True}
    return made


def test_a_model_takes_an_order(model: ImageModel) -> None:
    known = ["ar", "sjd", "scd", "scd-gumbel", "jacobi", "gsd", "parallel"]
    assert model.usable_samplers() == list(model.samplers) == known
    tokens = {o: model.generate([1, 2], seed=3, order=o, output_type="tokens").tokens for o in ORDERS}
    assert len({tuple(found[0].tolist()) for found in tokens.values()}) == len(ORDERS)
    seen: list[Any] = []
    plain = model.generate([1, 2], seed=3, callback=seen.append)  # each image has a random order of its own
    usual = "locality" if isinstance(model.family.components["gpt"], LPD) else "random"
    assert torch.equal(plain.tokens, tokens[usual]) and plain.stats.settings["order"] == usual
    assert all(torch.equal(now.tokens[now.known], plain.tokens[now.known]) for now in seen)
    constant = model.generate([1, 2], seed=3, guidance_schedule="constant", output_type="tokens")
    assert not torch.equal(constant.tokens, plain.tokens)
    requests = [Request(c, SamplingParams(seed=3, order=o)) for c, o in ((1, None), (2, None), (1, "halton"))]
    found = {(f.request.condition, f.request.params.order): f.tokens for f in Pool(model, size=2).run(requests)}
    assert torch.equal(torch.stack([found[1, None], found[2, None]]), plain.tokens)
    assert torch.equal(found[1, "halton"], tokens["halton"][0])


@pytest.mark.slow
def test_verify_on_a_model(model: ImageModel) -> None:
    assert all(row.passed for row in verify_model(model, 3, ["ar", "sjd", "scd"], tokens=16 * 256))


def test_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["generate", "--model", folder, "--class", 3]
    assert command(*given, "--order", "halton", "-o", tmp_path / "a") == 0
    assert "scd (exact)" in capsys.readouterr().out
    for arguments, message in (
        ("--order spiral", "cannot be 'spiral'. Known: raster, random, halton, farthest-point, locality"),
        ("--sampler zipar", "'zipar' samples rows side by side, and this model samples in any order. For"),
        ("--sampler eagle", "'eagle' needs a drafter, and this model samples in any order. For it there are: ar,"),
        ("--sampler sjd --set init=above", 'init="above" needs raster order, in which the cell above is'),
    ):
        assert command(*given, *arguments.split(), "-o", tmp_path / "c") == 2
        assert message in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_bad_input(class_pipe: ClassToImagePipeline, model: ImageModel) -> None:
    with pytest.raises(VisarError, match="order is for models that were trained to sample in any order; this one has"):
        class_pipe.image_model.generate([1], order="halton")
    with pytest.raises(VisarError, match="has no trees; use a sampler that drafts sequences"):
        session(RandAR, 3).forward(IDS[:, :3], Tree.of([-1, 0, 0]))
    with pytest.raises(VisarError, match="take no drafter"):
        model.load_drafter("eagle")
    with pytest.raises(VisarError, match="The drafter here samples in any order, and drafts for no other model"):
        class_pipe.image_model.family.drafting.check(gpt(), "here")
