"""What a pipeline says: figures of a decoding, and what a callback is told on the way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.tiny import GRID
from visar.engine.kv_cache import KVCache
from visar.engine.loop import decode
from visar.engine.memory import streamed_bytes
from visar.errors import VisarError
from visar.generation.progress import Progress
from visar.pipelines import ClassToImagePipeline, TextToImagePipeline
from visar.samplers import (
    Autoregressive,
    Jacobi,
    SpeculativeJacobi,
    get_sampler,
    samplers_for,
    spec_of,
)

TOKENS, SIDE = GRID**2, 2 * GRID
LINEAR = 32 * 96 + 32 * 32 + 3 * 32 * 48  # numbers in the linear layers of a block of the tiny GPT
WEIGHTS = 2 * (LINEAR + 64) + 32 + 24 * 32  # with two norms each, the last norm and the output head
Pipe = Any  # either pipeline


def tokens(pipe: Pipe, condition: Any, **settings: Any) -> torch.Tensor:
    return pipe(condition, output_type="tokens", **settings).tokens


# Figures


@pytest.mark.parametrize("name", samplers_for("discrete"))
def test_stats_of_every_sampler(text_pipe: TextToImagePipeline, drafters: list[Path], name: str) -> None:
    for folder in drafters if spec_of(name).drafter else ():
        text_pipe.load_drafter(folder)
    sampler = get_sampler(name, **({"ahead": 2} if name == "zipar" else {}))  # of rows of five tokens
    out = text_pipe(["red heart", "cat"], sampler=sampler, seed=9, output_type="tokens")
    stats = out.stats
    assert (stats.sampler, stats.exact, stats.exactness) == (name, spec_of(name).exact, spec_of(name).exactness)
    assert stats.exact == (stats.exactness == "exact")
    assert (stats.images, stats.tokens, stats.seed) == (2, TOKENS, 9)
    assert stats.passes_per_image == (out.commit_pass.amax(1) + 1).tolist()
    assert stats.nfe == max(stats.passes_per_image) + 1  # and the prefill of the caption
    assert stats.tokens_per_pass == TOKENS / max(stats.passes_per_image)  # of the batch, which waits for its slowest
    assert stats.ms_per_pass == pytest.approx(1000 * stats.seconds / (stats.nfe - 1))
    assert stats.gb_per_second == pytest.approx(stats.gigabytes / stats.seconds)
    assert (out.commit_pass >= 0).all()
    assert (out.commit_pass.diff(dim=1) >= 0).all() or name == "zipar"  # which knows no order but that of rows
    if name == "ar":
        assert stats.nfe == TOKENS + 1 and stats.tokens_per_pass == 1
    else:
        assert stats.nfe < TOKENS
    assert json.loads(json.dumps(stats.to_dict()))["gb_per_second"] == stats.gb_per_second
    assert str(stats).startswith(f"{name} ({stats.exactness}): {stats.nfe} NFE for {TOKENS} tokens x 2 images")


def test_no_prefill_for_a_class(class_pipe: ClassToImagePipeline) -> None:
    assert class_pipe(3, sampler="ar", output_type="tokens").stats.nfe == TOKENS
    stats = class_pipe([3, 4], output_type="tokens").stats
    assert stats.nfe == max(stats.passes_per_image) and stats.sampler == "scd"


def test_bytes_are_counted(class_pipe: ClassToImagePipeline) -> None:
    """Two rows (guidance), 2 layers, keys and values of 32 fp32 numbers; pass i reads i + 1 slots."""
    cache = 2 * 2 * 2 * 32 * 4 * sum(range(1, TOKENS + 1))
    counted = class_pipe(3, sampler="ar", output_type="tokens").stats.gigabytes * 1e9
    assert counted == pytest.approx(4 * WEIGHTS * TOKENS + cache, abs=0.5)
    class_pipe.quantize("int8")
    rounded = 2 * (LINEAR + 4 * (96 + 32 + 48 + 48 + 32)) + 4 * (WEIGHTS - 2 * LINEAR)  # and a scale for each output
    counted = class_pipe(3, sampler="ar", output_type="tokens").stats.gigabytes * 1e9
    assert counted == pytest.approx(rounded * TOKENS + cache, abs=0.5)


def test_bytes_of_a_caption_are_none(text_pipe: TextToImagePipeline) -> None:
    """The projector works before the first pass. Of three slots before the last one is left, so pass i reads i + 2."""
    cache = 2 * 2 * 2 * 32 * 4 * sum(range(2, TOKENS + 2))
    counted = text_pipe("cat", sampler="ar", output_type="tokens").stats.gigabytes * 1e9
    assert counted == pytest.approx(4 * WEIGHTS * TOKENS + cache, abs=0.5)
    shared = streamed_bytes(text_pipe.gpt)
    text_pipe.gpt.output.weight = text_pipe.gpt.tok_embeddings.weight  # a table that the head shares is read whole
    assert streamed_bytes(text_pipe.gpt) == shared


HEAD = 24 * 32
DRAFTERS_BYTES = {  # of a round, in numbers: the calls of a chain of one draft, or of the levels of a tree
    "eagle-chain": (64 * 32 + 32) + LINEAR + 5 * 32 + HEAD,
    "medusa": 3 * (2 * 32 * 32 + 32 + HEAD),
    "hydra": (2 + 3 + 4) * 32 * 32 + 3 * (32 * 32 + 32 + 32 + HEAD),
    "kangaroo": 2 * (LINEAR + 64) + 32 + HEAD,
    "swift": LINEAR + 64 + 32 + HEAD,
    "speculative": (3 * 16 * 16 + 16 * 16 + 3 * 16 * 48) + 2 * 16 + 16 + 24 * 16,
}


@pytest.mark.parametrize("name", DRAFTERS_BYTES)
def test_bytes_of_drafters(
    text_pipe: TextToImagePipeline, drafters: list[Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KVCache, "bytes_per_slot", 0)  # weights alone
    for folder in drafters:
        text_pipe.load_drafter(folder)
    chain = name not in ("medusa", "hydra")
    sampler = replace(get_sampler(name), **({"gamma": 1} if chain else {}))
    stats = text_pipe("cat", sampler=sampler, output_type="tokens").stats
    passes = stats.nfe - 1
    assert stats.gigabytes * 1e9 == pytest.approx(4 * (WEIGHTS + DRAFTERS_BYTES[name]) * passes, abs=0.5)


@pytest.mark.parametrize(
    "sampler",
    [
        Autoregressive(),
        Jacobi(window=3),
        SpeculativeJacobi(window=5, init="left"),
        SpeculativeJacobi(window=40, coupling="maximal", init="left-probs"),
        SpeculativeJacobi(window=6, coupling="gumbel", init="above"),
    ],
)
def test_configured_samplers(class_pipe: ClassToImagePipeline, sampler: Any) -> None:
    stats = class_pipe([1, 2], sampler=sampler, output_type="tokens").stats
    assert stats.sampler == sampler.name and stats.nfe >= -(-TOKENS // sampler.window)
    if isinstance(sampler, SpeculativeJacobi):
        assert stats.parameters == {"window": sampler.window, "coupling": sampler.coupling, "init": sampler.init}


def test_window_replaces_that_of_the_sampler(class_pipe: ClassToImagePipeline) -> None:
    for sampler in ("sjd", SpeculativeJacobi()):
        assert class_pipe(1, sampler=sampler, window=3, output_type="tokens").stats.parameters["window"] == 3


def test_forced_tokens_stay(text_pipe: TextToImagePipeline) -> None:
    forced = torch.full((TOKENS,), -1)
    forced[3:9] = torch.arange(6)
    free = tokens(text_pipe, ["cat", "dog"])
    for sampler in ("ar", "scd"):
        kept = tokens(text_pipe, ["cat", "dog"], sampler=sampler, forced_tokens=forced)
        assert (kept[:, 3:9] == torch.arange(6)).all() and not torch.equal(kept[:, 9:], free[:, 9:])
    with pytest.raises(VisarError, match="forced_tokens must hold 25 whole numbers"):
        text_pipe("cat", forced_tokens=forced[1:])


def test_overflow_is_an_error(class_pipe: ClassToImagePipeline) -> None:
    w2 = class_pipe.gpt.layers[0].feed_forward.w2.weight
    with torch.no_grad():
        w2.fill_(3e38)
    with pytest.raises(VisarError, match="logits are not finite in float32"):
        class_pipe(1)


# What is told on the way


def test_callback(text_pipe: TextToImagePipeline) -> None:
    seen: list[Progress] = []
    out = text_pipe(["red heart", "cat"], window=4, callback=seen.append)
    assert [p.passes for p in seen] == list(range(1, out.stats.nfe))
    lengths = torch.stack([p.lengths for p in seen])
    assert (lengths.diff(dim=0) >= 0).all() and (lengths.diff(dim=0).sum(1) > 0).all()
    assert (lengths[0] > 0).all() and (lengths[-1] == TOKENS).all()
    for progress in seen:  # all of them afterwards: what a callback keeps does not change
        preview = progress.preview()
        assert preview.shape == (2, GRID, GRID, 3) and preview.dtype == torch.uint8
        flat = preview.flatten(1, 2)
        for row, n in enumerate(progress.lengths.tolist()):
            assert torch.equal(progress.tokens[row, :n], out.tokens[row, :n])
            assert (flat[row, n:] == 128).all() and not (flat[row, :n] == 128).all()
            assert torch.equal(progress.known[row], torch.arange(TOKENS) < n)
            assert torch.equal(progress.commit_pass[row, :n], out.commit_pass[row, :n])
    assert [p.seconds for p in seen] == sorted(p.seconds for p in seen)
    assert seen[0].seconds > 0 and seen[-1].seconds <= out.stats.seconds


def test_images_on_the_way(text_pipe: TextToImagePipeline) -> None:
    """In full size: grey where nothing is decided, the image itself at the end, and nothing of the drafts."""
    seen: list[Progress] = []
    out = text_pipe(["red heart", "cat"], window=4, callback=seen.append)
    assert isinstance(out.images, list)
    half = seen[len(seen) // 2]
    for row, image in enumerate(half.images()):
        assert image.size == out.images[row].size
        cells = torch.from_numpy(np.array(image)).unfold(0, 2, 2).unfold(1, 2, 2).flatten(0, 1)
        grey = (cells == 128).flatten(1).all(1)
        assert torch.equal(grey, ~half.known[row])
    drafts = torch.where(half.known, half.tokens, (half.tokens + 1) % 24)
    others = replace(half, tokens=drafts).images()
    for a, b in zip(half.images(), others, strict=True):
        assert a.tobytes() == b.tobytes()
    for a, b in zip(seen[-1].images(), out.images, strict=True):
        assert a.tobytes() == b.tobytes()


def test_a_callback_costs_no_decoding_time(text_pipe: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that works while the host goes on: a pass takes it one second, what a callback begins three."""
    clock = work = 0.0

    def wait(device: torch.device) -> None:
        nonlocal clock, work
        clock, work = clock + work, 0.0

    step = Autoregressive.step

    def launched(*given: Any) -> None:
        nonlocal work
        step(*given)
        work += 1

    def draw(progress: Progress) -> None:
        nonlocal clock, work
        seen.append(progress.seconds)
        clock, work = clock + 5, work + 3

    seen: list[float] = []
    monkeypatch.setattr("visar.engine.loop.time", SimpleNamespace(perf_counter=lambda: clock))
    monkeypatch.setattr("visar.engine.loop.synchronize", wait)
    monkeypatch.setattr(Autoregressive, "step", launched)
    out = text_pipe("cat", sampler="ar", callback=draw)
    assert out.stats.seconds == TOKENS and seen == list(range(1, TOKENS + 1))


def test_a_callback_may_stop_the_decoding(text_pipe: TextToImagePipeline) -> None:
    class Enough(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.passes == 3:
            raise Enough

    before = text_pipe("cat", sampler="ar", output_type="tokens")
    with pytest.raises(Enough):
        text_pipe("cat", sampler="ar", callback=stop)
    assert torch.equal(text_pipe("cat", sampler="ar", output_type="tokens").tokens, before.tokens)


def test_preview_colours_are_near_the_image(text_pipe: TextToImagePipeline) -> None:
    """An image of one code only, against its colour in the preview."""
    ids = torch.arange(24)[:, None].expand(-1, TOKENS)
    colours = text_pipe.image_model.family.preview(ids)[:, :, 0, 0]
    mean = text_pipe.decode_tokens(ids).mean((2, 3))
    assert (colours - mean).abs().mean() < 0.5 * (mean - mean.mean(0)).abs().mean() + 0.02


def test_progress_bar(text_pipe: TextToImagePipeline, capfd: pytest.CaptureFixture[str]) -> None:
    text_pipe("cat", output_type="tokens")
    text_pipe("cat", output_type="tokens", callback=lambda progress: None)
    assert capfd.readouterr() == ("", "")
    text_pipe.set_progress_bar_config(disable=False)
    text_pipe(["cat", "dog"], output_type="tokens")
    assert f"100%|██████████| {2 * TOKENS}/{2 * TOKENS}" in capfd.readouterr().err


@pytest.mark.parametrize("window", [4, 25])
def test_a_progress_bar_comes_to_its_end(
    text_pipe: TextToImagePipeline, window: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where the rows are looked at after every fourth pass, as on a GPU."""

    def seldom(*given: Any) -> Any:
        *rest, _, graph = given
        return decode(*rest, 4, graph)

    monkeypatch.setattr("visar.generation.model.decode", seldom)
    text_pipe.set_progress_bar_config(disable=False)
    text_pipe("cat", window=window, output_type="tokens")
    assert f"100%|██████████| {TOKENS}/{TOKENS}" in capfd.readouterr().err
