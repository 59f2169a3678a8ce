"""RandAR: the published layout, the definition written out plainly, windows in any order, and exact sampling."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.cli.test_commands import run as command
from tests.helpers import plain_randar
from tests.helpers.recording import Recorder
from tests.helpers.tiny import VQ, class_gpt
from visar.engine.graphs import Graph
from visar.engine.guidance import Guidance
from visar.engine.layout import Layout
from visar.engine.loop import decode
from visar.engine.rng import Noise
from visar.engine.tree import Tree
from visar.errors import VisarError
from visar.eval.exactness.joint import MUTANT_LIMIT, chi_square_z, values
from visar.eval.exactness.late_rows import decoded_late
from visar.eval.exactness.on_model import verify_model
from visar.eval.exactness.tabular import Settings, reference_probs
from visar.families.catalogue import catalogue
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.loading import class_of, load_gpt
from visar.families.llamagen.randar import RandAR
from visar.families.llamagen.randar_session import RandARSession
from visar.families.llamagen.specs import RANDARS
from visar.families.llamagen.vq import VQModel
from visar.generation.model import ImageModel
from visar.generation.pool import Pool, Request
from visar.params import ORDERS, SamplingParams
from visar.pipelines import ClassToImagePipeline
from visar.samplers import SpeculativeJacobi, Target, default_sampler, get_sampler

GRID, LENGTH, VOCAB = 4, 16, 24
SIZES: dict[str, Any] = dict(vocab_size=VOCAB, dim=32, num_layers=2, num_heads=2, ffn=48, classes=7)
CLASSES = torch.tensor([0, 3, 6])
CELLS = torch.stack([torch.randperm(LENGTH, generator=torch.Generator().manual_seed(i)) for i in range(3)])


def gpt(grid: int = GRID, head: float = 0.2, **changes: Any) -> RandAR:
    """Weights that are large enough for every token, and every query, to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        model = RandAR(**SIZES | changes, grid=grid).eval().requires_grad_(False)
        for name, p in model.named_parameters():
            if p.ndim == 2:
                torch.nn.init.normal_(p, std=head if "output" in name else 1.5 * p.shape[-1] ** -0.5)
        torch.nn.init.normal_(model.pos_instruct_embeddings)
        return model


def session(
    model: RandAR, window: int, guidance: Guidance = Guidance(), made: type[RandARSession] = RandARSession
) -> RandARSession:
    return made(model, CLASSES, CELLS, length=LENGTH, window=window, grid=GRID, guidance=guidance)


def ids(seed: int = 8) -> Tensor:
    return torch.randint(VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(seed))


# Published files


def published(folder: Path, model: RandAR) -> Path:
    path = folder / "randar_0.3b_llamagen_360k_bs_1024_lr_0.0004.safetensors"
    save_file({key: value.clone() for key, value in model.state_dict().items()}, path)
    return path


def test_published_keys_load_unchanged(tmp_path: Path) -> None:
    model = gpt()
    sizes = {key: value for key, value in SIZES.items()}
    assert set(model.state_dict()) - set(LlamaGen(**sizes, grid=GRID).state_dict()) == {"pos_instruct_embeddings"}
    assert tuple(model.pos_instruct_embeddings.shape) == (1, 32)
    path = published(tmp_path, model)
    loaded = load_gpt(path, num_heads=2)
    assert type(loaded) is RandAR is class_of(path) and loaded.config.grid == 16
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    with torch.device("meta"):
        large = RandAR(vocab_size=16384, dim=1024, num_layers=24, num_heads=16, ffn=2816)
    listing = catalogue()["randar-l"]
    assert sum(p.numel() for p in large.parameters()) == listing.parameters == 342_910_976 + 1024
    assert listing.licence == "MIT (code)" and RANDARS["randar-xl"].guidance == 4.0
    state = model.state_dict() | {"pos_instruct_embeddings": torch.zeros(2, 32)}
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "two.safetensors")
    with pytest.raises(VisarError, match=r"pos_instruct_embeddings"):
        load_gpt(tmp_path / "two.safetensors", num_heads=2)


# The definition


def test_logits_are_those_of_the_definition() -> None:
    model, tokens = gpt(), ids()
    for n in (0, 5, 15):
        found = model(CLASSES, tokens[:, :n], None, CELLS)
        for b in range(3):
            own = plain_randar.logits(
                model.state_dict(), 2, GRID, int(CLASSES[b]), tokens[b, :n].tolist(), CELLS[b].tolist()
            )
            torch.testing.assert_close(found[b].double(), own, rtol=0, atol=2e-5)
    raster = torch.arange(LENGTH).expand(3, -1)
    assert torch.equal(model(CLASSES, tokens[:, :5]), model(CLASSES, tokens[:, :5], None, raster))
    assert (model(CLASSES, tokens[:, :5]) - model(CLASSES, tokens[:, :5], None, CELLS)).abs().max() > 0.1


@pytest.mark.parametrize("window", [1, 2, 5, 20])
def test_windows_equal_the_whole_sequence(window: int) -> None:
    """Ragged commits, wrong drafts first in every pass, passes in parts, and windows that run past the end."""
    model, tokens = gpt(), ids()
    expected, s = model(CLASSES, tokens[:, :-1], None, CELLS), session(model, window)
    counts, seen = torch.tensor([1, 2, 3]), torch.zeros(3, LENGTH, dtype=torch.bool)
    while (s.lengths < LENGTH).any():
        at = s.lengths.clone()
        right = tokens.gather(1, (at[:, None] - 1 + torch.arange(window)).clamp(0, LENGTH - 1))
        wrong = right.clone()
        wrong[:, 1:] = (wrong[:, 1:] + 1) % VOCAB
        s.forward(wrong)  # nothing of it is committed, so nothing of it may be seen later
        got = s.forward(right)
        if window > 2:
            parts = torch.cat([s.forward(right[:, :2]), s.forward(right[:, 2:], None, 2)], dim=1)
            torch.testing.assert_close(parts, got, rtol=0, atol=1e-5)
        for b in range(3):
            for n in range(int(at[b]), min(int(at[b]) + window, LENGTH)):
                torch.testing.assert_close(got[b, n - at[b]], expected[b, n], rtol=0, atol=1e-5)
                seen[b, n] = True
        s.commit(torch.minimum(counts.clamp_max(window), LENGTH - at))
        counts = counts.roll(1)
    assert seen.all()
    s.start(CLASSES, CELLS.flip(0))  # another order in the same buffers
    torch.testing.assert_close(
        s.forward(ids()[:, :window])[:, 0], model(CLASSES, ids()[:, :0], None, CELLS.flip(0))[:, 0], rtol=0, atol=1e-5
    )


def test_text_conditions_and_guidance_that_grows() -> None:
    changes: dict[str, Any] = dict(condition="text", condition_length=4, caption_features=6)
    model, tokens = gpt(**changes), ids()
    captions = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(7))
    mask = torch.arange(4) >= torch.tensor([[0], [2], [3]])
    null = model.cls_embedding.null_like(captions)
    cond, uncond = (model(c, tokens[:, :-1], mask, CELLS) for c in (captions, null))
    for grows, scale in ((False, torch.full((LENGTH,), 3.0)), (True, 1 + 2 * torch.arange(LENGTH) / LENGTH)):
        guidance = Guidance(3.0, -1, grows)
        s = RandARSession(model, captions, mask, CELLS, length=LENGTH, window=5, grid=GRID, guidance=guidance)
        s.commit(torch.tensor([0, 4, 9]))
        s.lengths.zero_()
        s.forward(torch.cat([tokens[:, :1] * 0, tokens[:, :4]], dim=1))
        s.commit(torch.tensor([4, 4, 4]))
        found = s.forward(tokens[:, 3:8])
        wanted = uncond + scale[:, None] * (cond - uncond)
        torch.testing.assert_close(found, wanted[:, 4:9], rtol=0, atol=1e-4)


# Exactness: images of four tokens of four values, whose probabilities come from whole sequences without a cache

SMALL = dict(vocab_size=4, classes=5)
ORDER, FORCED = (2, 1, 3, 0), (-1, 3, -1, -1)
SETTINGS = Settings(temperature=0.8, top_p=0.9, scale=2.0)
IMAGES = 4096


@functools.cache
def small() -> RandAR:
    return gpt(2, head=0.08, **SMALL)


@functools.cache
def expected(forced: tuple[int, ...] = ()) -> np.ndarray:
    """The probability of every image, [2 classes, V**N], in raster order, for tokens sampled in `ORDER`."""
    model, images = small(), torch.cartesian_prod(*[torch.arange(4)] * 4)
    cells = torch.tensor(ORDER).expand(len(images), -1)
    by_turn, out = images.gather(1, cells), np.ones((2, len(images)))
    own = Settings(**vars(SETTINGS) | {"forced": tuple(forced[cell] for cell in ORDER) if forced else ()})
    for c in range(2):
        given = torch.full((len(images),), c)
        null = model.cls_embedding.null_like(given)
        cond, uncond = (model(x, by_turn[:, :-1], None, cells).double().numpy() for x in (given, null))
        for i, image in enumerate(by_turn.tolist()):
            for n, token in enumerate(image):
                out[c, i] *= reference_probs(cond[i, n], uncond[i, n], n, own)[token]
    return out


def small_session(batch: int, kind: type[RandARSession], window: int, guidance: Guidance) -> RandARSession:
    cells = torch.tensor(ORDER).expand(batch, -1)
    made = kind(small(), torch.arange(batch) % 2, cells, length=4, window=window, grid=2, guidance=guidance)
    made.layout = Layout(2, 2)
    return made


def sampled(sampler: Any, kind: type[RandARSession], forced: tuple[int, ...], images: Tensor) -> Tensor:
    """The tokens [B, 4] of some images as one batch; the two classes take turns."""
    target = Target(0.8, 0, 0.9, torch.tensor(forced) if forced else None)
    made = small_session(len(images), kind, max(sampler.window, 2), Guidance(2.0))
    return decode(made, sampler, target, Noise(0, images)).tokens


def joint_z(
    sampler: Any, kind: type[RandARSession] = RandARSession, forced: tuple[int, ...] = (), count: int = IMAGES
) -> list[float]:
    """The chi-square z of the images of either class."""
    tokens = sampled(sampler, kind, forced, torch.arange(count))
    counts = [np.bincount(values(tokens[c::2], 4), minlength=256) for c in range(2)]
    return [chi_square_z(n, p) for n, p in zip(counts, expected(forced), strict=True)]


def chosen(name: str, window: int | None) -> Any:
    copying = SpeculativeJacobi(window=3, init="left-probs")
    return copying if name == "left-probs" else get_sampler(name, window=window)


@pytest.mark.parametrize(("name", "window"), [("ar", None), ("sjd", 3), ("scd", 3)])
def test_joint_distribution(name: str, window: int | None) -> None:
    """With a forced cell; four tokens are no multiple of a window of three, and the order is not the raster's."""
    p, sampler = expected(FORCED), chosen(name, window)
    assert p.sum(1) == pytest.approx([1, 1], abs=1e-9) and abs(p[0] - p[1]).sum() / 2 > 0.1
    assert all(abs(z) < 4 for z in joint_z(sampler, forced=FORCED))
    whole = sampled(sampler, RandARSession, FORCED, torch.arange(64))[:16]  # what holds of many holds of batches of two
    pairs = [sampled(sampler, RandARSession, FORCED, pair) for pair in torch.arange(16).split(2)]
    assert torch.equal(torch.cat(pairs), whole)


@pytest.mark.slow
@pytest.mark.parametrize("forced", [(), FORCED], ids=["free", "forced"])
@pytest.mark.parametrize(
    ("name", "window"), [("ar", None), ("sjd", 3), ("scd", 3), ("scd", 6), ("scd-gumbel", 3), ("left-probs", 3)]
)
def test_joint_distribution_of_more_images(name: str, window: int | None, forced: tuple[int, ...]) -> None:
    assert all(abs(z) < 4 for z in joint_z(chosen(name, window), forced=forced, count=4 * IMAGES))


class OwnRow(RandARSession):
    """The token has the rotary row of the cell that is sampled next, not its own."""

    def rotary_rows(self, slots: Tensor) -> Tensor:
        return super().rotary_rows(slots + 1)


class RasterQueries(RandARSession):
    """The queries ask for the cells in raster order."""

    def queries(self, rows: Tensor) -> Tensor:
        at = (self.lengths.repeat(self.batches)[:, None] + torch.arange(rows.shape[1])).clamp_max(self.length - 1)
        return super().queries(self.table[at + self.prefix])


class NoQuery(RandARSession):
    """All queries are alike."""

    def queries(self, rows: Tensor) -> Tensor:
        return super().queries(self.table[self.prefix].expand_as(rows))


class NotSorted(RandARSession):
    """The tokens stay in the order in which they were sampled."""

    def in_raster(self, values: Tensor, rows: slice = slice(None)) -> Tensor:
        return values


@pytest.mark.parametrize("mistake", [OwnRow, RasterQueries, NoQuery, NotSorted])
def test_mistakes_are_caught(mistake: type[RandARSession]) -> None:
    assert max(joint_z(get_sampler("scd", window=3), mistake, count=2048)) > MUTANT_LIMIT


# The engine


@pytest.mark.parametrize("name", [pytest.param("ar", marks=pytest.mark.slow), "scd"])
def test_rows_do_not_depend_on_others(name: str) -> None:
    """Alone, in a batch, and in slots that rows come to at different times, each in an order of its own."""
    model, target, forced = gpt(), Target(0.9, 10, 0.95), torch.full((LENGTH,), -1)
    forced[[1, 7]] = torch.tensor([5, 9])
    target, sampler, guidance = Target(0.9, 10, 0.95, forced), get_sampler(name), Guidance(2.0, -1, True)
    width = max(sampler.window, 2)
    whole = decode(session(model, width, guidance), sampler, target, Noise(1, torch.zeros(3)))
    assert (whole.tokens[:, [1, 7]] == torch.tensor([5, 9])).all()
    turns = whole.commit_pass.gather(1, CELLS)
    assert (turns.diff(dim=1) >= 0).all() and not (whole.commit_pass.diff(dim=1) >= 0).all()
    for row in range(3):

        def make(batch: int, guided: Guidance, row: int = row) -> RandARSession:
            own = CLASSES[row].expand(batch), CELLS[row].expand(batch, -1)
            return RandARSession(model, *own, length=LENGTH, window=width, grid=GRID, guidance=guided)

        alone = decode(make(1, guidance), sampler, target, Noise(1, torch.zeros(1)))
        assert torch.equal(alone.tokens[0], whole.tokens[row])
        late = decoded_late(make, sampler, target, guidance, torch.tensor([0, 4, 0]), seed=1)
        assert torch.equal(late[0], whole.tokens[row]) and not torch.equal(late[1], late[0])


def test_guidance_that_ends_drops_a_batch() -> None:
    found = []
    for window in (1, 4):
        s = session(gpt(), window, Guidance(2.0, 5))
        found.append(decode(s, SpeculativeJacobi(window=4) if window > 1 else get_sampler("ar"), Target(top_k=1),
                            Noise(4, torch.arange(3))).tokens)  # fmt: skip
        assert s.batches == 1
    assert torch.equal(*found)


@pytest.mark.slow
def test_a_step_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, noise, sampler = gpt(), Noise(4, torch.arange(3)), SpeculativeJacobi(window=5, init="left-probs")

    def made() -> RandARSession:
        s = session(model, 5, Guidance(2.0, -1, True))
        s.layout = Layout(GRID, GRID)
        return s

    plain = decode(made(), sampler, Target(0.9, 10), noise)
    found = decode(made(), sampler, Target(0.9, 10), noise, graph=Graph(Recorder(monkeypatch)))
    assert found.replays > 0 and torch.equal(found.tokens, plain.tokens)


# A loaded model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("randar") / "model"
    ClassToImagePipeline(gpt=gpt(), vq=VQModel(**VQ).eval()).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> ImageModel:
    made = ImageModel.load(folder)
    made.bar = {"disable": True}
    return made


def test_a_model_says_what_it_takes(model: ImageModel) -> None:
    assert isinstance(model.family.model, RandAR)
    assert model.usable_samplers() == list(model.samplers) == ["ar", "sjd", "scd", "scd-gumbel", "jacobi", "gsd"]
    assert default_sampler("discrete", "any") == "scd"
    assert model.params_of().order == "random" and model.params_of().guidance_schedule == "linear"
    images = {order: model.generate([1, 2], seed=3, order=order, output_type="tokens") for order in ORDERS}
    assert len({tuple(out.tokens[0].tolist()) for out in images.values()}) == len(ORDERS)
    assert images["halton"].stats.settings["order"] == "halton" and images["halton"].stats.exact
    plain = model.generate([1, 2], seed=3, output_type="tokens")  # each image has a random order of its own
    assert torch.equal(plain.tokens, images["random"].tokens)
    assert (plain.commit_pass[0].argsort() != plain.commit_pass[1].argsort()).any()
    alone = model.generate([2], seed=3, first_image=0, output_type="tokens")
    assert torch.equal(alone.tokens[0], plain.tokens[1])
    constant = model.generate([1, 2], seed=3, guidance_schedule="constant", output_type="tokens")
    assert not torch.equal(constant.tokens, plain.tokens)
    requests = [Request(c, SamplingParams(seed=3, order=o)) for c, o in ((1, None), (2, None), (1, "halton"))]
    found = {(f.request.condition, f.request.params.order): f.tokens for f in Pool(model, size=2).run(requests)}
    assert torch.equal(found[1, None], plain.tokens[0]) and torch.equal(found[2, None], plain.tokens[1])
    assert torch.equal(found[1, "halton"], images["halton"].tokens[0])


def test_callbacks_see_cells(model: ImageModel) -> None:
    seen = []
    out = model.generate([1], seed=3, order="locality", sampler="scd", callback=lambda now: seen.append(now))
    assert torch.equal(seen[-1].tokens, out.tokens) and seen[0].known.sum() == seen[0].lengths.sum()
    assert all(torch.equal(now.tokens[now.known], out.tokens[now.known]) for now in seen)


@pytest.mark.slow
def test_verify_on_a_model(model: ImageModel) -> None:
    rows = verify_model(model, 3, ["ar", "sjd", "scd"], tokens=16 * 256)
    assert [row.sampler for row in rows] == ["ar", "sjd", "scd"] and all(row.passed for row in rows)


def test_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", folder, "--class", 3]
    assert command("generate", *given, "--order", "halton", "-o", tmp_path / "a") == 0
    assert "scd (exact)" in capsys.readouterr().out
    for arguments, message in (
        (("--order", "spiral"), "cannot be 'spiral'. Known: raster, random, halton, farthest-point, locality"),
        (("--sampler", "zipar"), "'zipar' samples rows side by side, and this model samples in any order. For"),
        (("--sampler", "eagle"), "'eagle' needs a drafter, and this model samples in any order. For it there are: ar,"),
        (("--sampler", "sjd", "--set", "init=above"), 'init="above" needs raster order, in which the cell above is'),
    ):
        assert command("generate", *given, *arguments, "-o", tmp_path / "c") == 2
        assert message in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_bad_input(class_pipe: ClassToImagePipeline, model: ImageModel) -> None:
    with pytest.raises(VisarError, match="order is for models that were trained to sample in any order; this one has"):
        class_pipe.image_model.generate([1], order="halton")
    with pytest.raises(VisarError, match="order must be raster or random or halton or farthest-point or locality"):
        model.generate([1], order="spiral")
    with pytest.raises(VisarError, match="has no trees; use a sampler that drafts sequences"):
        session(gpt(), 3).forward(ids()[:, :3], Tree.of([-1, 0, 0]))
    with pytest.raises(VisarError, match="take no drafter"):
        model.load_drafter("eagle")
    with pytest.raises(VisarError, match="The drafter here samples in any order, and drafts for no other model"):
        class_pipe.image_model.family.drafting.check(gpt(), "here")
    assert class_gpt().scan == "raster"
