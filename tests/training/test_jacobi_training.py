"""Tuning for Jacobi decoding: the windows that are recorded, what is learnt from them, and what is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.tiny import GPT, WORDS, class_gpt
from tests.helpers.training import config, log_of
from visar.cli import main
from visar.engine.guidance import Guidance
from visar.errors import VisarError
from visar.families.llamagen.gpt import LlamaGen
from visar.pipelines import ClassToImagePipeline, TextToImagePipeline
from visar.samplers import SpeculativeJacobi, Target
from visar.training.jacobi import JacobiLoss, kl, see, some_windows, tune_jacobi
from visar.training.loop import alone
from visar.training.self_generated import Generated, generate_tokens

Capture = pytest.CaptureFixture[str]


def wary(pipe: Any) -> Any:
    """The pipeline with a GPT whose predictions depend on what it reads, as random weights hardly do."""
    torch.manual_seed(5)
    torch.nn.init.normal_(pipe.gpt.output.weight, std=0.4)
    torch.nn.init.normal_(pipe.gpt.tok_embeddings.weight, std=1.0)
    return pipe


def classes(rows: list[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor([i % 7 for i in rows]), torch.ones(len(rows), 1)


def windows(pipe: Any, file: Path, count: int = 14, batch: int = 7) -> Generated:
    return generate_tokens(
        pipe.image_model, list(range(7)), count, file, batch=batch, window=5, sampler="scd", seed=0, guidance_scale=2.0
    )


def test_windows_are_those_of_the_decoding(class_pipe: ClassToImagePipeline, tmp_path: Path) -> None:
    found = windows(wary(class_pipe), tmp_path / "a.safetensors")
    out = class_pipe(list(range(7)), sampler="scd", window=5, seed=0, guidance_scale=2.0, output_type="tokens")
    assert torch.equal(found.tokens[:7], out.tokens)
    there = found.drafts[..., 0] >= 0
    starts = torch.nn.functional.pad(out.commit_pass[:, 1:] != out.commit_pass[:, :-1], (1, 0))
    assert torch.equal(there[:7], starts)  # a window begins where a pass began, but for the first, which is noise
    at = torch.arange(25)[:, None] + torch.arange(4)
    assert torch.equal((found.drafts >= 0) & there[..., None], (at < 25) & there[..., None])
    became = found.tokens[:, at.clamp_max(24)]
    right = (found.drafts == became)[there & (torch.arange(25) < 22)]
    assert 0.1 < right.float().mean() < 0.5  # some are right, some wrong
    assert all(torch.equal(a, b) for a, b in zip(found, windows(class_pipe, tmp_path / "a.safetensors"), strict=True))
    part = windows(class_pipe, tmp_path / "b.safetensors", count=3, batch=2)
    more = windows(class_pipe, tmp_path / "b.safetensors")
    assert torch.equal(part.drafts, more.drafts[:3]) and torch.equal(found.drafts, more.drafts)
    with pytest.raises(VisarError, match="of another model or other settings"):
        generate_tokens(class_pipe.image_model, list(range(7)), 14, tmp_path / "a.safetensors", window=4, sampler="scd")


def test_a_window_is_seen_as_in_a_session(text_pipe: TextToImagePipeline) -> None:
    """Against plain passes over the tokens before the window and its drafts, under both halves of the guidance."""
    family = wary(text_pipe).image_model.family
    condition, mask = family.encode([WORDS[0], "cat, 3d"])
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 24, (2, 25), generator=g)
    starts = torch.tensor([[3, 20, 1], [23, 9, 4]])
    drafts = torch.randint(0, 24, (2, 3, 4), generator=g)
    drafts[starts[..., None] + torch.arange(4) > 24] = -1
    with torch.no_grad():
        seen = see(family.drafting, (condition, mask, tokens, starts, drafts), True)
        alone = see(family.drafting, (condition, mask, tokens), True)
        null = family.model.cls_embedding.null_like(condition)
        for half, its in enumerate((condition, null)):
            plain = family.model(its, tokens[:, :-1], mask)
            for clean in (seen.clean, alone.clean):
                torch.testing.assert_close(clean[2 * half : 2 * half + 2], plain, atol=1e-5, rtol=1e-4)
            for row in range(2):
                for k, start in enumerate(starts[row].tolist()):
                    given = torch.cat([tokens[row, :start], drafts[row, k]])[:24]
                    want = family.model(its[row : row + 1], given[None], mask[row : row + 1])[0, start + 1 :]
                    got = seen.drafted[2 * half + row, k, : len(want)]
                    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_what_counts(class_pipe: ClassToImagePipeline) -> None:
    """The loss of a model that is its own teacher is that of the tokens well behind a wrong draft, written out."""
    family = wary(class_pipe).image_model.family
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 24, (1, 25), generator=g)
    drafts = tokens[:, None, 5:9].clone()
    drafts[0, 0, 1] = (drafts[0, 0, 1] + 1) % 24
    given = (torch.tensor([3]), torch.ones(1, 1), tokens, torch.tensor([[5]]), drafts)
    loss = JacobiLoss(copy.deepcopy(family.model), family.drafting, Guidance(1.0), Target(0.7, 5))
    with torch.no_grad():
        seen = see(family.drafting, given, False)
        p, q = seen.clean[0, 8:10], seen.drafted[0, 0, 2:]
        target = Target(0.7, 5)
        tv = (target.probs(p[None], torch.zeros(1, 2)) - target.probs(q[None], torch.zeros(1, 2))).abs().sum(-1) / 2
        assert loss(*given).item() == pytest.approx((kl(p / 0.7, q / 0.7) + tv[0]).mean().item(), rel=1e-4)
        right = (*given[:3], given[3], tokens[:, None, 5:9])
        assert loss(*right).item() == pytest.approx(0, abs=1e-6)


def test_a_tuned_model_takes_fewer_passes(class_pipe: ClassToImagePipeline, tmp_path: Path) -> None:
    images = windows(wary(class_pipe), tmp_path / "images.safetensors", count=56, batch=28)
    target = class_pipe.image_model.family.drafting
    run = config(tmp_path, steps=60, batch=8, lr=0.03, warmup=5, ema=0.9, optimizer="sgd",
                 weight_decay=0.0)  # fmt: skip
    before = {k: v.clone() for k, v in class_pipe.gpt.state_dict().items()}
    tuned = tune_jacobi(target, classes, images, run, Guidance(2.0), Target())
    assert all(torch.equal(v, before[k]) for k, v in class_pipe.gpt.state_dict().items())  # the teacher stays
    (tmp_path / "state.pt").unlink()  # so that it might be anybody's
    with pytest.raises(VisarError, match=r"gpt is not of a run that can resume, which has a state\.pt; give another"):
        tune_jacobi(target, classes, images, run, Guidance(2.0), Target())
    row = log_of(tmp_path)[-1]
    assert row["overlap"] > row["overlap-before"] and row["clean-overlap"] > 0.85
    assert abs(row["cross-entropy-change"]) < 0.06
    given = (*classes(list(range(56))), images.tokens, *some_windows(images.drafts, 16, torch.Generator()))
    losses = [JacobiLoss(gpt, target, Guidance(2.0), Target())(*given).item() for gpt in (class_pipe.gpt, tuned)]
    assert losses[1] < 0.98 * losses[0]
    passes = []
    for gpt in (class_pipe.gpt, LlamaGen.from_pretrained(tmp_path / "gpt")):
        class_pipe.image_model.family.replace("gpt", gpt)
        out = class_pipe(list(range(7)) * 4, sampler=SpeculativeJacobi(5, coupling="maximal"), guidance_scale=2.0,
                         output_type="tokens")  # fmt: skip
        passes.append(sum(out.stats.passes_per_image))
    assert passes[1] < 0.97 * passes[0], passes
    assert all(torch.equal(v, tuned.state_dict()[k]) for k, v in gpt.state_dict().items())


def test_an_interrupted_run_goes_on(
    class_pipe: ClassToImagePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, target = windows(wary(class_pipe), tmp_path / "images.safetensors"), class_pipe.image_model.family.drafting
    rest = (target, classes, images)

    def tune(folder: str, **changes: Any) -> LlamaGen:
        return tune_jacobi(*rest, config(tmp_path / folder, batch=2, **changes), Guidance(2.0), Target())

    whole = tune("a")
    calls: list[int] = []

    def stops(*args: Any) -> tuple[Tensor, Tensor]:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return some_windows(*args)

    with monkeypatch.context() as patch:
        patch.setattr("visar.training.jacobi.some_windows", stops)
        with pytest.raises(KeyboardInterrupt):
            tune("b", save_minutes=0)
    assert LlamaGen.from_pretrained(tmp_path / "b" / "gpt").config == whole.config  # complete at every moment
    found = tune("b")
    assert all(torch.equal(found.state_dict()[k], v) for k, v in whole.state_dict().items())
    with pytest.raises(VisarError, match="a run with other settings: start was"):
        tune_jacobi(*rest, config(tmp_path / "b"), Guidance(2.0), Target(), start=class_gpt())
    with pytest.raises(VisarError, match="2 or more images to learn from, not 1"):
        few = Generated(images.tokens[:1], images.drafts[:1])
        tune_jacobi(target, classes, few, replace(config(tmp_path / "c")), Guidance(2.0), Target())


def test_a_second_run_ends_before_it_samples(class_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    with alone(tmp_path):
        assert main(["train", "jacobi", "--model", str(class_folder), "-n", "6", "-o", str(tmp_path)]) == 2
        assert f"Another run trains in {tmp_path}; wait until" in capsys.readouterr().err
        assert [file.name for file in tmp_path.iterdir()] == [".lock"]


def test_from_a_model_to_images(class_folder: Path, text_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    def jacobi(*arguments: object) -> int:
        fixed = ("-n", 6, "--batch", 3, "--steps", 2, "--window", 4, "--no-compile")
        return main(["train", "jacobi", *map(str, (*fixed, *arguments))])

    (tmp_path / "captions.txt").write_text("red heart\ncat, 3d\n")
    text = ("--model", text_folder, "--captions", tmp_path / "captions.txt")
    assert jacobi(*text, "-o", tmp_path / "one") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == str(tmp_path / "one" / "gpt") and "6 of 6 images sampled" in err
    assert json.loads(out.splitlines()[-2])["step"] == 2
    # A second round, on windows of the tuned GPT, and the parts put together
    assert jacobi(*text, "--init", tmp_path / "one" / "gpt", "-o", tmp_path / "two") == 0
    parts = ("--tokenizer", text_folder / "vq", "--words", text_folder / "text_encoder")
    assert main(["train", "assemble", "--gpt", str(tmp_path / "two" / "gpt"), *map(str, parts), "-o",
                 str(tmp_path / "made")]) == 0  # fmt: skip
    assert main(["generate", "red cat", "--model", str(tmp_path / "made"), "-o", str(tmp_path / "cat.png")]) == 0
    capsys.readouterr()
    LlamaGen(**{**GPT, "dim": 64}, condition="text", condition_length=4, caption_features=6).save_pretrained(
        tmp_path / "wide"
    )
    for arguments, message in (
        ((*text, "--init", tmp_path / "wide", "-o", tmp_path / "no"), "has other sizes: dim 64 instead of 32"),
        ((*text, "--init", tmp_path / "none", "-o", tmp_path / "no"), "is not a saved component"),
        (("--model", "icons-mar", *text[2:], "-o", tmp_path / "no"), "a MAR has no windows of tokens"),
        (("--model", text_folder, "-o", tmp_path / "no"), "needs --captions"),
        ((*text, "--window", 1, "-o", tmp_path / "no"), "must be 2 or more"),
        ((*text, "--window", 5, "-o", tmp_path / "one"), "of another model or other settings"),
    ):
        try:
            code = jacobi(*arguments)
        except SystemExit as done:
            code = done.code  # type: ignore[assignment]
        assert code == 2 and message.lower() in capsys.readouterr().err.lower(), message
    assert jacobi("--model", class_folder, "-o", tmp_path / "of-classes") == 0


@pytest.mark.slow
def test_the_command_compiles_by_default(class_folder: Path, tmp_path: Path) -> None:
    command = ["train", "jacobi", "--model", str(class_folder), "-n", "6", "--batch", "2", "--window", "4"]
    assert main([*command, "--steps", "2", "-o", str(tmp_path)]) == 0
    assert (tmp_path / "gpt" / "config.json").exists()
