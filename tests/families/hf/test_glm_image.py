"""GLM-Image's codes against the stock `generate` and processor of transformers, on a tiny one of random weights.

Where the stock code is wrong, a test shows it next to the right value.
"""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import visar
from tests.families.hf.test_sessions import farthest
from tests.families.hf.worlds import WORLDS
from tests.helpers.tiny_glm import CODES, glm, glm_processor, small_drafts, stock_glm, stock_inputs, tiny_glm
from tests.helpers.tiny_hf import PROMPTS, janus_processor
from visar import cli
from visar.errors import VisarError
from visar.families.hf import glm_image
from visar.generation.model import ImageModel
from visar.generation.pool import Pool, Request
from visar.params import SamplingParams
from visar.samplers.wavefront import ZipAR

SIZE: dict[str, Any] = {"height": 64, "width": 128}  # a draft of 2 x 5, and 2 x 4 codes


@pytest.fixture(autouse=True)
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "published" not in request.node.name:
        small_drafts(monkeypatch)


@pytest.fixture
def pipe() -> Any:
    made = visar.accelerate(*glm())
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder's part of the repository."""
    path = tmp_path_factory.mktemp("families") / "glm"
    for part, name in zip(glm(), ("vision_language_encoder", "processor"), strict=True):
        part.save_pretrained(path / name)
    (path / "model_index.json").write_text(json.dumps({"_class_name": "GlmImagePipeline"}))
    return path


def greedy(pipe: Any, prompts: Any, sampler: Any = "ar", **size: Any) -> torch.Tensor:
    return pipe(prompts, sampler=sampler, top_k=1, output_type="tokens", **(size or SIZE)).tokens


@pytest.mark.parametrize("sampler", ["ar", "scd"])
def test_greedy_tokens_are_those_of_generate(pipe: Any, sampler: str) -> None:
    stock = stock_glm(*glm(), PROMPTS, **SIZE)
    assert len(stock.unique(dim=0)) == len(PROMPTS) and len(stock.unique()) > 15
    assert torch.equal(greedy(pipe, list(PROMPTS), sampler), stock)
    for i, text in enumerate(PROMPTS):
        assert torch.equal(greedy(pipe, text, sampler), stock[i : i + 1])
        assert torch.equal(stock_glm(*glm(), [text], **SIZE), stock[i : i + 1])


@pytest.mark.slow
def test_greedy_tokens_with_a_draft_of_the_published_size() -> None:
    model, processor = tiny_glm(seed=3), glm_processor()
    stock = stock_glm(model, processor, PROMPTS, 96, 128)
    assert stock.shape == (3, 13 * 18 + 3 * 4)
    assert torch.equal(greedy(visar.accelerate(model, processor), list(PROMPTS), height=96, width=128), stock)


def test_grids_are_those_of_the_published_processor() -> None:
    shape = glm_processor()._get_target_shape
    for rows in range(1, 65):
        for columns in range(1, 65):
            assert shape(32 * rows, 32 * columns) == (rows, columns, *glm_image.draft_of((rows, columns)))
    assert glm_image.draft_of((36, 24)) == (19, 13)  # 1152 x 768: both are rounded down


def test_windows_and_trees_are_a_stock_pass() -> None:
    assert farthest(WORLDS["glm-image"]()) < 1e-5


@torch.inference_mode()
def test_positions_are_those_of_generate() -> None:
    model, processor = glm()
    inputs = stock_inputs(processor, PROMPTS, **SIZE)
    prompts, _ = model.model.get_rope_index(**{k: v for k, v in inputs.items() if k != "pixel_values"})
    decoded = model.model._cached_decode_position_ids.permute(1, 0, 2)[..., :-1]  # the last is the end's
    grids = [tuple(grid[1:]) for grid in inputs["image_grid_thw"][:2].tolist()]
    decoder = glm_image.GlmDecoder(model, CODES, grids[::-1])
    prefix = inputs["attention_mask"].sum(1)
    found = decoder.position_ids(prefix[:, None] + torch.arange(decoded.shape[2]), prefix)
    assert torch.equal(found, decoded)
    for row, own in enumerate(inputs["attention_mask"].bool()):
        at = torch.arange(int(prefix[row]))[None]
        assert torch.equal(decoder.position_ids(at, prefix[row : row + 1]).expand(3, 1, -1)[:, 0], prompts[:, row, own])


def test_rows_side_by_side_begin_after_the_draft(pipe: Any) -> None:
    """ZipAR with a lead of a whole row is plain decoding."""
    plain = greedy(pipe, list(PROMPTS))
    assert torch.equal(greedy(pipe, list(PROMPTS), ZipAR(ahead=4)), plain)
    out = pipe(list(PROMPTS), sampler=ZipAR(ahead=1), output_type="tokens", **SIZE)
    assert int(out.commit_pass.max()) + 1 == 2 * 5 + 4 + 1 and int(out.commit_pass.min()) == 0


# Where the stock code is wrong


def test_several_images_of_a_prompt_have_their_own_positions(pipe: Any) -> None:
    """`num_return_sequences` gives a greedy image of the stock model the positions of two drafts, or of two images."""
    alone = stock_glm(*glm(), PROMPTS[:1], 96, 256)
    twice = stock_glm(*glm(), PROMPTS[:1], 96, 256, num_return_sequences=2, do_sample=True, top_k=1)
    assert not torch.equal(twice[0], alone[0]) and not torch.equal(twice[1], alone[0])
    out = pipe(PROMPTS[0], num_images_per_prompt=2, top_k=1, output_type="tokens", height=96, width=256)
    assert torch.equal(out.tokens, alone.expand(2, -1))


def test_codes_are_compared_as_the_tokenizer_does(pipe: Any) -> None:
    quantize, codebook = glm()[0].model.vqmodel.quantize, pipe.image_model.family.codebook
    maps = torch.randn(1, codebook.shape[1], 5, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ids = quantize(maps)[2].flatten()
    assert torch.equal(torch.cdist(maps.flatten(2)[0].T, codebook).argmin(1), ids) and len(ids.unique()) > 5


def test_no_token_ends_an_image_early(pipe: Any) -> None:
    model, processor = tiny_glm(seed=1), glm_processor()
    with torch.no_grad():  # as the end of an image may be sampled anywhere
        model.lm_head.weight[CODES + 1] = 2 * model.lm_head.weight[3]
    length, before = len(stock_glm(*glm(), PROMPTS[:1], **SIZE)[0]), len(PROMPTS)
    stock = stock_glm(model, processor, PROMPTS, **SIZE, suppress=False)
    assert before == len(stock) and int((stock >= CODES).sum()) > 0
    assert stock.shape[1] < length or int((stock[:, -1] >= CODES).sum())
    out = visar.accelerate(model, processor)(list(PROMPTS), seed=1, output_type="tokens", **SIZE)
    assert out.tokens.shape == (3, length) and int(out.tokens.max()) < CODES


def test_prompts_at_once_do_not_share_positions(pipe: Any) -> None:
    """The stock model keeps the positions of its last prompt, of whatever size, for all."""
    model, processor = glm()
    other: dict[str, Any] = {"height": 128, "width": 64}
    wanted = {text: greedy(pipe, text, **size) for text, size in zip(PROMPTS, (SIZE, other), strict=False)}
    stock_glm(model, processor, PROMPTS[2:], 64, 64)  # which leaves positions behind
    found: dict[str, torch.Tensor] = {}

    def make(text: str, size: dict[str, Any]) -> None:
        own = visar.accelerate(model, processor)
        own.set_progress_bar_config(disable=True)
        found[text] = greedy(own, text, **size)

    threads = [threading.Thread(target=make, args=pair) for pair in zip(PROMPTS, (SIZE, other), strict=False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[text], wanted[text]) for text in wanted)


# Settings, sizes and folders


def test_defaults_are_those_of_the_generation_config(pipe: Any) -> None:
    defaults = pipe.image_model.family.defaults
    assert (defaults.temperature, defaults.top_p, defaults.top_k, defaults.guidance_scale) == (0.9, 0.75, 0, 1.0)
    model, processor = tiny_glm(), glm_processor()
    model.generation_config.update(temperature=0.5, top_p=None, top_k=7)
    defaults = visar.accelerate(model, processor).image_model.family.defaults
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (0.5, 0.75, 7)


def test_rows_that_are_taken_in_turns(pipe: Any) -> None:
    model = ImageModel.of(pipe).sized(64, 128)
    settings = [SamplingParams(seed=2), SamplingParams(temperature=0.7, top_k=9)]
    requests = [Request(text, settings[i % 2], tag=i) for i, text in enumerate([*PROMPTS, PROMPTS[0]])]
    for done in Pool(model, "scd", size=2, guided=False).run(requests):
        out = model.generate(done.request.condition, done.request.params, sampler="scd", output_type="tokens")
        assert torch.equal(done.tokens, out.tokens[0])


def test_the_command_line_gives_codes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = visar.load(folder, image_size="128x64")
    stock = stock_glm(*glm(), PROMPTS[2:], **SIZE)
    assert torch.equal(loaded("cat", top_k=1, sampler="ar", output_type="tokens").tokens, stock)
    model = ["--model", str(folder), "--image-size", "128x64"]
    assert cli.main(["bench", *model, "--samplers", "ar", "--repeats", "1", "-n", "1"]) == 0
    assert cli.main(["generate", "cat", *model, "-o", str(tmp_path / "a.png")]) == 2
    assert "has no transformer to make pixels with: ask for its tokens" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
    (tmp_path / "prompts.txt").write_text("cat")
    many = ["--prompts", str(tmp_path / "prompts.txt"), "-n", "1", "--out", str(tmp_path / "many")]
    assert cli.main(["sample", *model, *many]) == 2
    assert "has no transformer" in capsys.readouterr().err and not (tmp_path / "many").exists()


@pytest.mark.slow
def test_verify_on_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["--samplers", "ar,sjd,scd,scd-gumbel", "--image-size", "64x96"]
    assert cli.main(["verify", "--model", str(folder), *names, "--sequences", "16384", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 4 and all(row["passed"] for row in rows)


def test_the_decoder_alone_is_a_folder_too(tmp_path: Path) -> None:
    for part in glm():
        part.save_pretrained(tmp_path)
    loaded = visar.load(tmp_path, image_size=96)
    out = loaded("cat", output_type="tokens")
    assert out.tokens.shape == (1, 16 + 9)
    assert torch.equal(loaded("cat", output_type="tokens", height=96, width=96).tokens, out.tokens)


def test_what_is_refused(pipe: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(match: str, *args: Any, **keywords: Any) -> None:
        with pytest.raises(VisarError, match=match) as caught:
            pipe(*args, **{"output_type": "tokens", **SIZE, **keywords})
        assert "\n" not in str(caught.value)

    for size in ({"height": 500}, {"width": 132}, {"height": 0}, {"width": -32}):
        refused("multiples of 32 pixels, not", "cat", **size)
    refused("too narrow for the draft", "cat", height=32, width=32 * 99)
    refused(r"has \d+ tokens; this model has room for 2048", "cat", height=32 * 50, width=32 * 50)
    refused(r"this model has room for 2048", "cat", height=32 * 10**9, width=32 * 10**9)
    refused(r"The prompt has \d+ tokens; this model takes at most", " ".join(["wide"] * 3000))
    for text in ("a <start> cat", "a <|image|> cat", "cat <end>"):
        refused("a token of the model's that stands for an image", text)
    refused("no unconditional prompts", "cat", guidance_scale=2.0)
    with pytest.raises(VisarError, match="has no transformer to make pixels with"):
        pipe("cat", **SIZE)
    with pytest.raises(VisarError, match="Give the processor of this GlmImageForConditionalGeneration"):
        visar.accelerate(glm()[0])
    with pytest.raises(VisarError, match="of this GLM-Image has no chat template; give the GlmImageProcessor"):
        visar.accelerate(glm()[0], glm()[1].tokenizer)("cat")
    with pytest.raises(VisarError, match="writes prompts in another way"):
        visar.accelerate(glm()[0], janus_processor())("cat")
    with pytest.raises(VisarError, match="image_size is a number of pixels, or width x height"):
        visar.load(folder, image_size=(64, 64))
    with pytest.raises(VisarError, match="multiples of 32 pixels, not 100 and 100"):
        visar.load(folder, image_size=100)
    with pytest.raises(VisarError, match="a folder has its own"):
        visar.load("icons", image_size=64)
    path = Path(shutil.copytree(folder, tmp_path / "model"))
    shutil.rmtree(path / "vision_language_encoder")
    with pytest.raises(VisarError, match=r"has no weights: a file model\.safetensors"):
        visar.load(path)
    monkeypatch.setattr(glm_image, "DRAFT", 5)  # not the processor's
    refused("writes prompts in another way", "cat", height=96, width=96)
