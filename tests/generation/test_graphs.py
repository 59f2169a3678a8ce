"""Pipelines that keep sessions and captured steps between calls, and what they say where memory does not do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.recording import Recorder
from visar.engine import memory
from visar.errors import VisarError
from visar.generation.progress import Progress
from visar.generation.sessions import Sessions
from visar.pipelines import TextToImagePipeline
from visar.text_encoders.words import WordEncoder

PROMPTS = ["red heart", "blue star"]


@pytest.mark.parametrize(
    "name", ["scd", *(pytest.param(n, marks=pytest.mark.slow) for n in ("ar", "eagle", "speculative"))]
)
def test_calls_of_one_shape_share_a_graph(
    name: str, text_pipe: TextToImagePipeline, drafters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in drafters:
        text_pipe.load_drafter(path)
    forced = torch.full((text_pipe.image_model.family.layout.length,), -1)
    calls = (
        dict(prompt=PROMPTS, seed=1),
        dict(prompt=["cat", "red city"], seed=2),
        dict(prompt=PROMPTS, seed=1, temperature=0.7),  # another law: another graph
        dict(prompt=PROMPTS, seed=1, forced_tokens=forced.clone().index_fill_(0, torch.tensor([0, 3]), 5)),
        dict(prompt=PROMPTS[::-1], seed=3, forced_tokens=forced.clone().index_fill_(0, torch.tensor([1]), 7)),
        dict(prompt="cat", seed=5),
        dict(prompt=PROMPTS, seed=4, guidance_scale=3.0, guidance_interval=4),  # is not kept
    )
    plain = [text_pipe(**call, sampler=name, output_type="tokens") for call in calls]  # type: ignore[arg-type]
    assert all(p.stats.graph_passes == 0 and p.stats.capture_seconds == 0 for p in plain)
    record = Recorder(monkeypatch)
    sessions = text_pipe.image_model.sessions = Sessions(record, limit=3)
    captures = (1, 1, 2, 3, 3, 4, None)
    for call, expected, made in zip(calls, plain, captures, strict=True):
        found = text_pipe(**call, sampler=name, output_type="tokens")  # type: ignore[arg-type]
        assert torch.equal(found.tokens, expected.tokens)
        if made is not None:
            assert record.captures == made and found.stats.graph_passes > 0
            none = 0 if name in ("ar", "scd") else None
            assert found.stats.draft_seconds == found.stats.draft_passes == none
    assert len(sessions.cache) == 3


def test_a_session_that_a_callback_broke_off_is_not_kept(
    text_pipe: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(progress: Progress) -> None:
        if progress.passes == 4:  # replayed
            raise InterruptedError

    expected = text_pipe(PROMPTS, seed=1, sampler="ar", output_type="tokens").tokens
    record = Recorder(monkeypatch)
    sessions = text_pipe.image_model.sessions = Sessions(record)
    text_pipe(PROMPTS, seed=2, sampler="ar", output_type="tokens")
    assert len(sessions.cache) == 1
    with pytest.raises(InterruptedError):
        text_pipe(PROMPTS, seed=3, sampler="ar", callback=stop)
    assert len(sessions.cache) == 0
    again = text_pipe(PROMPTS, seed=1, sampler="ar", output_type="tokens")
    assert record.captures == 2 and torch.equal(again.tokens, expected)


def test_a_schedule_of_the_host_is_not_captured(
    text_pipe: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Recorder(monkeypatch)
    text_pipe.image_model.sessions = Sessions(record)
    assert text_pipe("red heart", sampler="zipar").stats.graph_passes == 0
    assert record.captures == 0 and not len(text_pipe.image_model.sessions.cache)


def test_too_little_memory_is_said_before(text_pipe: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    length = text_pipe.image_model.family.layout.length
    each = text_pipe.image_model.family.bytes_per_image(16, guided=True)
    # Two halves of keys and values in fp32 over two layers, two condition slots, and the logits of a window.
    assert each == 2 * 2 * 2 * 32 * (2 + length + 16) * 4 + 12 * 16 * 24 * 4
    monkeypatch.setattr(memory, "free_memory", lambda device: 3 * each)
    text_pipe(["cat"] * 3, sampler="sjd", guidance_scale=2.0, output_type="tokens")
    with pytest.raises(VisarError, match=r"^4 images at once need about 0\.0 GiB .*; 3 would fit\.$"):
        text_pipe(["cat"] * 4, sampler="sjd", guidance_scale=2.0, output_type="tokens")
    text_pipe(["cat"] * 4, sampler="sjd", guidance_scale=1.0, output_type="tokens")  # one half


def test_pixels_and_masked_models_need_memory_too(
    text_pipe: TextToImagePipeline, words: WordEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    import visar.generation.model as generation
    from tests.pipelines.test_masked import small_vae, text_mar

    monkeypatch.setattr(memory, "free_memory", lambda device: 4 * 3 * 10 * 10 * generation.COPIES * 2)
    with pytest.raises(VisarError, match=r"^3 images at once need .*; 2 would fit\.$"):
        text_pipe(["cat"] * 3)
    mar = TextToImagePipeline(mar=text_mar(), vae=small_vae(), text_encoder=words)
    each = mar.image_model.family.bytes_per_image(1, guided=True)
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 * each)
    with pytest.raises(VisarError, match=r"^3 images at once need .*; 2 would fit\.$"):
        mar(["red cat"] * 3, guidance_scale=2.0, output_type="tokens")
    with pytest.raises(VisarError, match="images at once need"):
        text_pipe("cat", num_images_per_prompt=10**12)


def test_free_memory_is_that_of_the_machine() -> None:
    assert 2**20 < memory.free_memory(torch.device("cpu")) < 2**50
