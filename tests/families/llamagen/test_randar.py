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
from tests.helpers.recording import Recorder
from tests.helpers.tiny import VQ
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
from visar.families.llamagen.vq import VQModel
from visar.generation.model import ImageModel
from visar.generation.pool import Pool, Request
from visar.params import ORDERS, SamplingParams
from visar.pipelines import ClassToImagePipeline
from visar.samplers import SpeculativeJacobi, Target, get_sampler

GRID, LENGTH, VOCAB = 4, 16, 24
SIZES: dict[str, Any] = dict(vocab_size=VOCAB, dim=32, num_layers=2, num_heads=2, ffn=48, classes=7)
CLASSES = torch.tensor([0, 3, 6])
CELLS = torch.stack([torch.randperm(LENGTH, generator=torch.Generator().manual_seed(i)) for i in range(3)])
IDS = torch.randint(VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(8))


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


def session(window: int, guidance: Guidance = Guidance()) -> RandARSession:
    made = RandARSession(gpt(), CLASSES, CELLS, length=LENGTH, window=window, grid=GRID, guidance=guidance)
    made.layout = Layout(GRID, GRID)
    return made


def test_published_keys_load_unchanged(tmp_path: Path) -> None:
    model = gpt()
    assert set(model.state_dict()) - set(LlamaGen(**SIZES).state_dict()) == {"pos_instruct_embeddings"}
    save_file(model.state_dict(), path := tmp_path / "randar.safetensors")
    loaded = load_gpt(path, num_heads=2)
    assert type(loaded) is RandAR is class_of(path) and loaded.config.grid == 16
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    listing = catalogue()["randar-l"]
    assert (listing.parameters, listing.licence) == (342_910_976 + 1024, "MIT (code)")
    save_file(model.state_dict() | {"pos_instruct_embeddings": torch.zeros(2, 32)}, path)
    with pytest.raises(VisarError, match="pos_instruct_embeddings"):
        load_gpt(path, num_heads=2)


def turned(x: Tensor, cell: int) -> Tensor:
    """Vectors [..., d], whose neighbouring pairs are turned: the first half by the row, the rest by the column."""
    quarter = x.shape[-1] // 4
    rates = 10000.0 ** (-torch.arange(quarter).double() / quarter)
    angles = torch.cat([cell // GRID * rates, cell % GRID * rates])
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean() + 1e-5).sqrt() * weight


def plain(model: RandAR, label: int, tokens: list[int], cells: list[int]) -> Tensor:
    """Logits [n + 1, V], float64, by the definition, one input after the other, without visar's layers.

    The inputs are the class, whose queries and keys are 0, and then a query and a token of each cell.
    """
    w = {key: value.double() for key, value in model.state_dict().items()}
    inputs, at = [w["cls_embedding.embedding_table.weight"][label]], [-1]
    for token, cell in zip([*tokens, -1], cells, strict=True):
        query = turned(w["pos_instruct_embeddings"].view(2, -1), cell).flatten()
        inputs, at = [*inputs, query, w["tok_embeddings.weight"][token]], [*at, cell, cell]
    for i in range(2):
        part = {key.removeprefix(f"layers.{i}."): value for key, value in w.items()}
        keys, read, out = [], [], []
        for x, cell in zip(inputs, at, strict=True):
            qkv = (part["attention.wqkv.weight"] @ normed(x, part["attention_norm.weight"])).view(3, 2, -1)
            q, k = (turned(one, cell) if cell >= 0 else one * 0 for one in qkv[:2])
            keys.append(k)
            read.append(qkv[2])
            scores = torch.einsum("hd,nhd->hn", q, torch.stack(keys)) * q.shape[-1] ** -0.5
            heads = torch.einsum("hn,nhd->hd", scores.softmax(-1), torch.stack(read))
            x = x + part["attention.wo.weight"] @ heads.flatten()
            y = normed(x, part["ffn_norm.weight"])
            gate = part["feed_forward.w1.weight"] @ y
            up = gate * gate.sigmoid() * (part["feed_forward.w3.weight"] @ y)
            out.append(x + part["feed_forward.w2.weight"] @ up)
        inputs = out
    return torch.stack([w["output.weight"] @ normed(x, w["norm.weight"]) for x in inputs[1::2]])


@pytest.mark.parametrize("n", [0, 7, 15])
def test_logits_are_those_of_the_definition(n: int) -> None:
    found = gpt()(CLASSES, IDS[:, :n], None, CELLS).double()
    own = [plain(gpt(), int(c), IDS[b, :n].tolist(), CELLS[b, : n + 1].tolist()) for b, c in enumerate(CLASSES)]
    torch.testing.assert_close(found, torch.stack(own), rtol=0, atol=2e-5)


@pytest.mark.parametrize("window", [1, 2, 5, 20])
def test_windows_equal_the_whole_sequence(window: int) -> None:
    """Ragged commits, wrong drafts first in every pass, passes in parts, and windows that run past the end."""
    expected, s, counts = gpt()(CLASSES, IDS[:, :-1], None, CELLS), session(window), torch.tensor([1, 2, 3])
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


def test_captions_and_guidance_that_grows() -> None:
    model = gpt(condition="text", condition_length=4, caption_features=6)
    captions, mask = torch.randn(3, 4, 6), torch.arange(4) >= torch.tensor([[0], [2], [3]])
    null = model.cls_embedding.null_like(captions)
    cond, uncond = (model(c, IDS[:, :-1], mask, CELLS) for c in (captions, null))
    for grows, scale in ((False, 3), (True, 1 + 2 * torch.arange(LENGTH)[:, None] / LENGTH)):
        named: Any = dict(length=LENGTH, window=5, grid=GRID, guidance=Guidance(3.0, -1, grows))
        s = RandARSession(model, captions, mask, CELLS, **named)
        s.forward(IDS[:, [0, 0, 1, 2, 3]])
        s.commit(torch.full((3,), 4))
        wanted = uncond + scale * (cond - uncond)
        torch.testing.assert_close(s.forward(IDS[:, 3:8]), wanted[:, 4:9], rtol=0, atol=1e-4)


# Exactness: images of four tokens of four values, whose probabilities come from whole sequences without a cache

ORDER, FORCED, IMAGES = (2, 1, 3, 0), (-1, 3, -1, -1), 4096


@functools.cache
def small() -> RandAR:
    return gpt(2, head=0.08, vocab_size=4)


@functools.cache
def expected() -> np.ndarray:
    """The probability of every image, [2 classes, V**N], in raster order, for tokens sampled in `ORDER`."""
    images = torch.cartesian_prod(*[torch.arange(4)] * 4)
    settings = Settings(0.8, 0, 0.9, 2.0, forced=tuple(FORCED[cell] for cell in ORDER))
    cells = torch.tensor(ORDER).expand(len(images), -1)
    by_turn, out = images.gather(1, cells), np.ones((2, len(images)))
    for c in range(2):
        given = torch.full((len(images),), c)
        null = small().cls_embedding.null_like(given)
        cond, uncond = (small()(x, by_turn[:, :-1], None, cells).double().numpy() for x in (given, null))
        for i, image in enumerate(by_turn.tolist()):
            for n, token in enumerate(image):
                out[c, i] *= reference_probs(cond[i, n], uncond[i, n], n, settings)[token]
    return out


def sampled(sampler: Any, images: Tensor, kind: type[RandARSession] = RandARSession) -> Tensor:
    """The tokens [B, 4] of some images as one batch; the two classes take turns."""
    cells, window = torch.tensor(ORDER).expand(len(images), -1), max(sampler.window, 2)
    made = kind(small(), images % 2, cells, length=4, window=window, grid=2, guidance=Guidance(2.0))
    made.layout = Layout(2, 2)
    return decode(made, sampler, Target(0.8, 0, 0.9, torch.tensor(FORCED)), Noise(0, images)).tokens


def worst_z(tokens: Tensor) -> float:
    """The chi-square z of the images of either class."""
    counts = [np.bincount(values(tokens[c::2], 4), minlength=256) for c in range(2)]
    return max(abs(chi_square_z(n, p)) for n, p in zip(counts, expected(), strict=True))


SAMPLERS = [get_sampler("ar"), *(get_sampler(name, window=3) for name in ("sjd", "scd"))]
MORE = [get_sampler("scd", window=6), get_sampler("scd-gumbel", window=3), SpeculativeJacobi(3, "left-probs")]


@pytest.mark.parametrize("sampler", [*SAMPLERS, *(pytest.param(s, marks=pytest.mark.slow) for s in MORE)], ids=repr)
def test_joint_distribution(sampler: Any) -> None:
    """With a forced cell; four tokens are no multiple of a window of three, and the order is not the raster's."""
    assert expected().sum(1) == pytest.approx([1, 1], abs=1e-9) and abs(np.subtract(*expected())).sum() / 2 > 0.1
    tokens = sampled(sampler, torch.arange(IMAGES))
    assert worst_z(tokens) < 4
    pairs = [sampled(sampler, pair) for pair in torch.arange(16).split(2)]  # what holds of many holds of two
    assert torch.equal(torch.cat(pairs), tokens[:16])


class OwnRow(RandARSession):
    """The token has the rotary row of the cell that is sampled next, not its own."""

    def rotary_rows(self, slots: Tensor) -> Tensor:
        return super().rotary_rows(slots + 1)


class NoQuery(RandARSession):
    """All queries are alike."""

    def queries(self, rows: Tensor) -> Tensor:
        return super().queries(self.table[self.prefix].expand_as(rows))


class NotSorted(RandARSession):
    """The tokens stay in the order in which they were sampled."""

    def in_raster(self, values: Tensor, rows: slice = slice(None)) -> Tensor:
        return values


@pytest.mark.parametrize("mistake", [OwnRow, NoQuery, NotSorted])
def test_mistakes_are_caught(mistake: type[RandARSession]) -> None:
    assert worst_z(sampled(SAMPLERS[2], torch.arange(IMAGES), mistake)) > MUTANT_LIMIT


# The engine


def test_rows_do_not_depend_on_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, in a batch, captured, and in slots that rows come to at different times, each in an order of its own."""
    forced = torch.full((LENGTH,), -1)
    forced[[1, 7]] = torch.tensor([5, 9])
    target, sampler, guidance = Target(0.9, 10, 0.95, forced), get_sampler("scd", init="left"), Guidance(2.0, -1, True)
    noise = Noise(1, torch.zeros(3))
    whole = decode(session(16, guidance), sampler, target, noise)
    graph = Graph(Recorder(monkeypatch))
    assert torch.equal(decode(session(16, guidance), sampler, target, noise, graph=graph).tokens, whole.tokens)
    assert (whole.tokens[:, [1, 7]] == torch.tensor([5, 9])).all() and graph.replays
    assert (whole.commit_pass.gather(1, CELLS).diff(dim=1) >= 0).all()
    for row in range(3):

        def make(batch: int, guided: Guidance, row: int = row) -> RandARSession:
            own = CLASSES[row].expand(batch), CELLS[row].expand(batch, -1)
            made = RandARSession(gpt(), *own, length=LENGTH, window=16, grid=GRID, guidance=guided)
            made.layout = Layout(GRID, GRID)
            return made

        late = decoded_late(make, sampler, target, guidance, torch.tensor([0, 4, 0]), seed=1)
        assert torch.equal(late[[0, 2]], whole.tokens[row].expand(2, -1)) and not torch.equal(late[1], late[0])


# A loaded model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("randar") / "model"
    ClassToImagePipeline(gpt=gpt(), vq=VQModel(**VQ).eval()).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> ImageModel:
    made = ImageModel.load(folder)
    made.bar = {"disable": True}
    return made


def test_a_model_takes_an_order(model: ImageModel) -> None:
    assert model.usable_samplers() == list(model.samplers) == ["ar", "sjd", "scd", "scd-gumbel", "jacobi", "gsd"]
    tokens = {o: model.generate([1, 2], seed=3, order=o, output_type="tokens").tokens for o in ORDERS}
    assert len({tuple(found[0].tolist()) for found in tokens.values()}) == len(ORDERS)
    seen: list[Any] = []
    plain = model.generate([1, 2], seed=3, callback=seen.append)  # each image has a random order of its own
    assert torch.equal(plain.tokens, tokens["random"]) and plain.stats.settings["order"] == "random"
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
        session(3).forward(IDS[:, :3], Tree.of([-1, 0, 0]))
    with pytest.raises(VisarError, match="take no drafter"):
        model.load_drafter("eagle")
    with pytest.raises(VisarError, match="The drafter here samples in any order, and drafts for no other model"):
        class_pipe.image_model.family.drafting.check(gpt(), "here")
