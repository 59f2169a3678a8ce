"""Emu3 against the stock `generate`, decoder and processor of transformers, on tiny ones of random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import visar
from tests.families.hf.grids import NAMES, check_joint, expected_images, session
from tests.helpers.hf_folders import Damage, check_commands, check_damaged, check_verified, edited
from tests.helpers.recording import Recorder
from tests.helpers.tiny_emu3 import emu3, emu3_processor, stock_emu3, tiny_emu3
from tests.helpers.tiny_hf import PROMPTS
from visar.engine.graphs import Graph
from visar.engine.guidance import Guidance
from visar.engine.loop import decode
from visar.engine.rng import Noise
from visar.errors import VisarError
from visar.families.hf.emu3 import NEGATIVE, Emu3Family
from visar.generation.model import ImageModel
from visar.generation.pool import Pool, Request
from visar.samplers import Target, get_sampler

ROWS, COLUMNS = 4, 3


@pytest.fixture
def pipe() -> Any:
    made = visar.accelerate(*emu3())
    made.set_progress_bar_config(disable=True)
    return made


def ids_of(pipe: Any, tokens: Tensor) -> Tensor:
    family: Any = ImageModel.of(pipe).family
    found: Tensor = family.ids(tokens)
    return found


@pytest.mark.parametrize("sampler", ["ar", "scd"])
def test_greedy_ids_are_those_of_generate(pipe: Any, sampler: str) -> None:
    stock = stock_emu3(*emu3(), PROMPTS)
    assert stock.shape == (3, ROWS * (COLUMNS + 1) + 3)
    assert len(stock.unique(dim=0)) == len(PROMPTS) and len(stock.unique()) > 15
    assert torch.equal(ids_of(pipe, pipe(list(PROMPTS), sampler=sampler, top_k=1, output_type="tokens").tokens), stock)
    for i, text in enumerate(PROMPTS):
        found = pipe(text, sampler=sampler, top_k=1, output_type="tokens").tokens
        assert torch.equal(ids_of(pipe, found), stock[i : i + 1])
    if sampler == "scd":
        square = emu3_processor(ratio="1:1", area=256)
        out = pipe(PROMPTS[0], height=16, width=16, sampler=sampler, top_k=1, output_type="tokens")
        family: Any = ImageModel.of(pipe).family.sized(16, 16)
        assert torch.equal(family.ids(out.tokens), stock_emu3(emu3()[0], square, PROMPTS[:1]))
    weak = stock_emu3(*emu3(), PROMPTS, 1.5)
    out = pipe(list(PROMPTS), sampler=sampler, top_k=1, guidance_scale=1.5, output_type="tokens")
    assert torch.equal(ids_of(pipe, out.tokens), weak) and not torch.equal(weak, stock)


def test_the_stock_guidance_rounds_in_bfloat16() -> None:
    """Its unconditional log-probabilities are as coarse as the logits; in float32 the two are one distribution."""
    from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor

    seed = torch.Generator().manual_seed(0)
    c, u = (torch.randn(1, 4096, generator=seed) for _ in range(2))

    def stock(dtype: torch.dtype) -> Tensor:
        def model(*_: Any, **__: Any) -> Any:
            return type("Out", (dict,), {"logits": u[:, None].to(dtype)})()

        rule = UnbatchedClassifierFreeGuidanceLogitsProcessor(3.0, model, torch.zeros(1, 1, dtype=torch.long))
        return rule(torch.zeros(1, 1, dtype=torch.long), c.to(dtype).float()).softmax(-1)

    for dtype, low, high in ((torch.float32, 0, 1e-6), (torch.bfloat16, 2e-3, 0.1)):
        cond, uncond = (x.to(dtype).float()[:, None] for x in (c, u))
        ours = Guidance(3.0).combine(cond, uncond, torch.zeros(1, 1)).softmax(-1)
        assert low <= (ours[:, 0] - stock(dtype)).abs().sum() / 2 < high


def test_pixels_are_those_of_the_stock_decoder(pipe: Any) -> None:
    model, processor = emu3()
    out = pipe(list(PROMPTS), seed=3, output_type="pt")
    stock = model.decode_image_tokens(image_tokens=ids_of(pipe, out.tokens), height=ROWS, width=COLUMNS)
    assert out.images.shape == (3, 3, 8 * ROWS, 8 * COLUMNS)
    torch.testing.assert_close(out.images, (stock / 2 + 0.5).clamp(0, 1), atol=1e-6, rtol=0)
    theirs = processor.postprocess(list(stock[:1]), return_tensors="PIL.Image.Image")["pixel_values"][0]
    ours = pipe(PROMPTS[0], seed=3).images[0]
    assert ours.size == theirs.size == (8 * COLUMNS, 8 * ROWS)
    assert np.abs(np.array(ours).astype(int) - np.array(theirs).astype(int)).max() <= 1  # theirs are cut, not rounded


def test_tokens_that_no_image_has_at_their_position(pipe: Any) -> None:
    """A negative id would count from the end, an end of a row in it be a code, and a code at the end be left out."""
    tokens = pipe("cat", sampler="ar", output_type="tokens").tokens
    forced = pipe.image_model.family.forced
    end, inside = int((forced >= 0).nonzero()[0]), int((forced < 0).nonzero()[0])
    for at, bad in ((inside, -1), (inside, int(forced[end])), (end, 3), (end, -1)):
        with pytest.raises(VisarError, match=f"no image token, such as {bad}, at its position"):
            pipe.decode_tokens(tokens.index_fill(1, torch.tensor(at), bad))
    assert pipe.decode_tokens(tokens[:0]).shape[:2] == (0, 3)


def test_a_forced_token_costs_no_pass(pipe: Any) -> None:
    out = pipe(PROMPTS[0], sampler="ar", seed=1, output_type="tokens")
    line_end = out.tokens.view(ROWS, COLUMNS + 1)[:, -1]
    assert (line_end == line_end[0]).all() and (out.tokens == line_end[0]).sum() == ROWS
    assert out.commit_pass.max() + 1 == ROWS * COLUMNS  # passes: one for each code


def test_rows_that_are_taken_in_turns(pipe: Any) -> None:
    model = ImageModel.of(pipe)
    requests = [Request(text, model.params_of(seed=i), tag=i) for i, text in enumerate((*PROMPTS, PROMPTS[0]))]
    for sampler in ("ar", "scd"):
        for done in Pool(model, sampler, size=2).run(requests):
            r = done.request
            out = model.generate(r.condition, r.params, sampler=sampler, output_type="tokens")
            assert torch.equal(done.tokens, out.tokens[0]) and done.nfe == out.stats.nfe


def flatter(model: Any) -> Any:
    with torch.no_grad():
        model.lm_head.weight /= 2
    return model


@pytest.fixture(scope="module")
def small() -> Emu3Family:
    """Images of 2 x 2 codes of three values."""
    return Emu3Family(flatter(tiny_emu3(codes=3)), emu3_processor(codes=3, ratio="1:1", area=256))


@pytest.fixture(scope="module")
def expected(small: Emu3Family) -> np.ndarray:
    return expected_images(small, lambda ids: small.model(ids).logits)


@pytest.mark.parametrize("name", NAMES)
def test_joint_distribution_with_forced_tokens(name: str, small: Emu3Family, expected: np.ndarray) -> None:
    check_joint(small, expected, name)


def test_a_captured_step_feeds_forced_tokens(small: Emu3Family, monkeypatch: pytest.MonkeyPatch) -> None:
    record, images = Recorder(monkeypatch), torch.arange(3)
    target, sampler = Target(0.9, forced=small.forced, allowed=small.allowed), get_sampler("ar")
    with torch.inference_mode():
        plain = decode(session(small, 3, 2, Guidance(3.0)), sampler, target, Noise(3, images), every=1)
        kept = session(small, 3, 2, Guidance(3.0))
        found = decode(kept, sampler, target, Noise(3, images), every=1, graph=Graph(record))
    assert torch.equal(found.tokens, plain.tokens) and record.captures == 1 and found.passes == 4 > found.replays > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("families") / "emu3"
    tiny_emu3(max_position_embeddings=9216).save_pretrained(path)
    emu3_processor().save_pretrained(path)
    return path


def fewer_codes(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    del config["vocabulary_map"]["<|visual token 000003|>"]
    (path / "config.json").write_text(json.dumps(config))


def no_line_end(path: Path) -> None:
    text = (path / "tokenizer.json").read_text()
    (path / "tokenizer.json").write_text(text.replace("<|extra_200|>", "<|extra_199|>"))


DAMAGE: Damage = {
    "the original layout": (edited("config.json", model_type="Emu3"), "in the layout of BAAI's own code, which visar"),
    "no map of codes": (edited("config.json", vocabulary_map=None), "has no vocabulary_map"),
    "a code missing": (fewer_codes, r"has 15 tokens <\|visual token \.\.\.\|>, and its image tokenizer 16 codes"),
    "no end of rows": (no_line_end, r"tokenizer of this Emu3 has no token <\|extra_200\|>"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders(damage: str, folder: Path, tmp_path: Path) -> None:
    check_damaged(folder, tmp_path, *DAMAGE[damage])


def test_the_command_line_works_by_registration(folder: Path, tmp_path: Path) -> None:
    check_commands(folder, tmp_path, (32, 32), "--image-size", "32", samplers="ar,sjd:window=4")


@pytest.mark.slow
def test_verify_on_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_verified(folder, capsys, "ar,sjd,scd", "--image-size", "32")


def test_a_folder_loads_and_has_the_published_size(folder: Path) -> None:
    family: Any = ImageModel.load(folder).family
    assert family.name == "emu3" and family.pixels == (720, 720) and family.layout.length == 90 * 91
    assert family.prompt_ids("cat")[1] == emu3_processor(ratio="1:1", area=518400)(
        text=[NEGATIVE], return_for_image_generation=True
    )["input_ids"][0]  # fmt: skip


def test_what_is_refused(folder: Path) -> None:
    model = emu3()[0]
    for settings, message in (
        (dict(ratio="wide"), r"ratio must be like '4:3'"),
        (dict(area="big"), r"image_area a number of pixels"),
        (dict(area=4), "are multiples of 8 pixels, not 0 and 0"),
        (dict(area=10**6), r"cells is \d+ tokens, and this model has 256 positions"),
    ):
        with pytest.raises(VisarError, match=message):
            visar.accelerate(model, emu3_processor(**settings))
    with pytest.raises(VisarError, match="are multiples of 8 pixels, not 100 and 100"):
        ImageModel.load(folder, image_size=100)
    with pytest.raises(VisarError, match="holds, as text, a token of the model's that stands for an image"):
        visar.accelerate(model, emu3_processor())("a red <image>")
    with pytest.raises(VisarError, match="the Emu3Processor of its prompts is missing"):
        visar.accelerate(model, emu3_processor().tokenizer)
