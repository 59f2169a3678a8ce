"""Bulk sampling in one process: what is drawn and said of it, going on, and other settings."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from visar.bulk import Condition, RunFolder, sample_images
from visar.errors import VisarError
from visar.generation.pool import Pool
from visar.pipelines import TextToImagePipeline
from visar.samplers import SpeculativeJacobi

PROMPTS = ("red cat", "blue dog", "city, flat")


def images(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("[!.]*.png"))}


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def told(folder: Path) -> list[dict[str, Any]]:
    """The manifest without what a clock decides."""
    clock = ("seconds", "draft_seconds")
    return [line | {"stats": {k: v for k, v in line["stats"].items() if k not in clock}} for line in manifest(folder)]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture(scope="module")
def whole(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run of seven images, three at a time."""
    pipe = TextToImagePipeline.from_pretrained(text_folder)
    pipe.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("runs") / "whole"
    sample_images(pipe, PROMPTS, folder, count=7, batch=3, seed=5, tokens=True)
    return folder


@pytest.fixture
def go(text_pipe: TextToImagePipeline, tmp_path: Path) -> Callable[..., Any]:
    """The run of `whole`, in a folder of its own."""

    def run(folder: str = "own", **other: Any) -> Any:
        given: dict[str, Any] = {"count": 7, "batch": 3, "seed": 5, "tokens": True}
        return sample_images(text_pipe, PROMPTS, tmp_path / folder, **given | other)

    return run


# What is drawn


def test_images_are_those_of_the_pipeline(whole: Path, text_pipe: TextToImagePipeline) -> None:
    """Image i is the image of its prompt and index, of which `generate` makes the same."""
    assert names(whole) == [*(f"{i:06d}.png" for i in range(7)), "manifest.jsonl", "run.json"]
    for i, line in enumerate(manifest(whole)):
        alone = text_pipe(PROMPTS[i % 3], seed=5, first_image=i // 3)
        assert line["tokens"] == alone.tokens[0].tolist()
        drawn = torch.tensor(list(Image.open(whole / line["file"]).tobytes()))
        wanted = torch.tensor(list(alone.images[0].tobytes()))
        assert (drawn - wanted).abs().max() <= 1  # another batch may round otherwise


def test_what_the_manifest_says(whole: Path, text_pipe: TextToImagePipeline) -> None:
    lines = manifest(whole)
    assert [line["id"] for line in lines] == [f"{i:06d}" for i in range(7)]
    assert [line["file"] for line in lines] == [f"{i:06d}.png" for i in range(7)]
    assert [line["prompt"] for line in lines] == [PROMPTS[i % 3] for i in range(7)]
    assert [line["index"] for line in lines] == [0, 0, 0, 1, 1, 1, 2]
    for line in lines:
        stats, alone = line["stats"], text_pipe(line["prompt"], seed=5, first_image=line["index"]).stats
        assert (line["seed"], line["sampler"], line["exact"]) == (5, "scd", True)
        assert (stats["passes"], stats["nfe"], stats["batch"]) == (alone.passes_per_image[0], alone.nfe, 3)
        assert stats["seconds"] > 0 and stats["draft_seconds"] == 0
        assert "metadata" not in line and "prompt_id" not in line


def test_what_the_run_says(whole: Path, text_pipe: TextToImagePipeline) -> None:
    about = json.loads((whole / "run.json").read_text())
    assert (about["format"], about["count"], about["batch"], about["seed"], about["tokens"]) == (1, 7, 3, 5, True)
    assert about["sampler"] == "scd" and about["parameters"]["window"] == 16 and about["exact"]
    assert about["settings"]["guidance_scale"] == text_pipe.config.guidance_scale == 2.0
    assert about["conditions"]["conditions"] == 3 and len(about["conditions"]["sha256"]) == 64
    (machine,) = about["machines"]
    assert machine["threads"] == torch.get_num_threads() and machine["torch"] == torch.__version__
    assert about["dtype"] == "float32"


def test_the_run_is_described_first(go: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((tmp_path / "own" / "run.json").exists())
        return original(self, *args, **kwargs)

    original = Pool.admit
    monkeypatch.setattr(Pool, "admit", call)
    go()
    assert seen == [True] * 8  # one asks whether rows can be replaced


def test_what_comes_back(go: Callable[..., Any], tmp_path: Path) -> None:
    done = go()
    lines = manifest(tmp_path / "own")
    assert (done.images, done.sampled, done.sampler, done.exact) == (7, 7, "scd", True)
    assert done.passes == pytest.approx(sum(line["stats"]["passes"] for line in lines) / 7)
    assert str(done).startswith(f"scd (exact): 7 images in {tmp_path / 'own'}, 7 of them sampled now, ")
    assert go().sampled == 0


def test_defaults(text_pipe: TextToImagePipeline, tmp_path: Path) -> None:
    sample_images(text_pipe, PROMPTS, tmp_path)
    assert names(tmp_path) == [*(f"{i:06d}.png" for i in range(3)), "manifest.jsonl", "run.json"]
    assert "tokens" not in manifest(tmp_path)[0]


# Going on


class Stop(BaseException):
    """A kill, as far as one process can show it."""


@pytest.mark.parametrize("after", [0, 1, 3, 6])
def test_a_run_goes_on(
    go: Callable[..., Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Stopped when so many images are saved, and others are half done: the rest is drawn, the bytes are equal."""
    saved = 0

    def save(self: Image.Image, *args: Any, **kwargs: Any) -> None:
        nonlocal saved
        if saved == after:
            raise Stop
        saved += 1
        original(self, *args, **kwargs)

    original = Image.Image.save
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save)
        with pytest.raises(Stop):
            go()
    if after:
        journal, *saved_images, about = names(tmp_path / "own")
        assert (journal, about) == (".journal.0", "run.json") and len(saved_images) == after
    else:
        assert not (tmp_path / "own").exists()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "own").glob("[!.]*.png")}
    assert go().sampled == 7 - after
    assert len(before) == after and all(p.stat().st_mtime_ns == time for p, time in before.items())
    assert images(tmp_path / "own") == images(whole) and told(tmp_path / "own") == told(whole)
    assert names(tmp_path / "own") == names(whole)


def unfinished(whole: Path, folder: Path, lines: int) -> bytes:
    """`whole` as it was after so many lines, and the line that comes next."""
    folder.mkdir()
    all_lines = (whole / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    for name in ("run.json", *(f"{i:06d}.png" for i in range(lines))):
        (folder / name).write_bytes((whole / name).read_bytes())
    (folder / ".journal.0").write_bytes(b"".join(all_lines[:lines]))
    return all_lines[lines]


@pytest.mark.parametrize("part", [1, 30, -1])
def test_a_line_cut_short(go: Callable[..., Any], whole: Path, tmp_path: Path, part: int) -> None:
    """Its image is drawn again, and the next line begins a line of its own, so that a second stop loses nothing."""
    folder = tmp_path / "own"
    cut = unfinished(whole, folder, 3)
    with open(folder / ".journal.0", "ab") as journal:
        journal.write(cut[:part])
    for i in (3, 4):
        (folder / f"{i:06d}.png").write_bytes((whole / f"{i:06d}.png").read_bytes())  # saved, but no line yet
    seen = []
    finish = RunFolder.finish

    def stop(self: RunFolder, count: int) -> None:
        seen.append(sorted(self.done()))
        finish(self, count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "finish", stop)
        assert go().sampled == 4
    assert seen == [list(range(7))]
    assert images(folder) == images(whole) and told(folder) == told(whole) and names(folder) == names(whole)


def test_a_cut_line_of_another_rank(go: Callable[..., Any], whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    cut = unfinished(whole, folder, 3)
    (folder / ".journal.1").write_bytes((folder / ".journal.0").read_bytes() + cut[:40])
    (folder / ".journal.0").unlink()
    assert go().sampled == 4
    assert told(folder) == told(whole) and names(folder) == names(whole)


def test_damaged_lines_are_left_out(go: Callable[..., Any], whole: Path, tmp_path: Path) -> None:
    """As a power cut may leave them; their images are drawn again."""
    folder = tmp_path / "own"
    unfinished(whole, folder, 3)
    lines = (folder / ".journal.0").read_bytes().splitlines(keepends=True)
    (folder / ".journal.0").write_bytes(lines[0] + bytes(40) + b'\n{"id": \n[1]\n{"file": "000002.png"}\n' + lines[1])
    assert go().sampled == 5
    assert images(folder) == images(whole) and told(folder) == told(whole)


@pytest.mark.parametrize("damage", ["gone", "half", "empty", "end"])
def test_a_image_that_is_not_whole_is_drawn_again(
    go: Callable[..., Any], whole: Path, tmp_path: Path, damage: str
) -> None:
    """Of an unfinished run, and of a finished one."""
    unfinished(whole, tmp_path / "own", 5)
    for drawn in (3, 1):
        image = tmp_path / "own" / "000004.png"
        data = image.read_bytes()
        left = {"half": data[: len(data) // 2], "empty": b"", "end": data[len(data) // 2 :]}
        image.unlink() if damage == "gone" else image.write_bytes(left[damage])
        assert go().sampled == drawn
        assert images(tmp_path / "own") == images(whole) and told(tmp_path / "own") == told(whole)


def test_leftovers_of_killed_runs_go(go: Callable[..., Any], whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    unfinished(whole, folder, 3)
    for name in (".000003.77.partial.png", ".manifest.77.partial.jsonl", ".run.77.partial.json", ".visar.77", ".lock.0",
                 ".lock.3"):  # fmt: skip
        (folder / name).write_text("half")
    go()
    assert names(folder) == names(whole)


def test_more_images_later(go: Callable[..., Any], whole: Path, tmp_path: Path) -> None:
    """Those that are there stay; the new ones are those of a run of this length."""
    go(count=3)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "own").glob("*.png")}
    assert go(count=7).sampled == 4
    assert images(tmp_path / "own") == images(whole) and told(tmp_path / "own") == told(whole)
    assert all(p.stat().st_mtime_ns == time for p, time in before.items())
    with pytest.raises(VisarError, match=r"holds a run of 7 images; give -n 7 or more\.$"):
        go(count=6)


def test_more_images_of_a_batch_that_was_begun(go: Callable[..., Any], whole: Path, tmp_path: Path) -> None:
    go(count=5)
    assert go(count=7).sampled == 2
    assert [line["tokens"] for line in manifest(tmp_path / "own")] == [line["tokens"] for line in manifest(whole)]
    assert images(tmp_path / "own")["000005.png"] == images(whole)["000005.png"]


def test_an_unfinished_longer_run_is_not_finished(go: Callable[..., Any], tmp_path: Path) -> None:
    """The manifest of the shorter run does not pass for it."""
    go(count=3)
    about = json.loads((tmp_path / "own" / "run.json").read_text())
    (tmp_path / "own" / "run.json").write_text(json.dumps(about | {"count": 7}))
    with pytest.raises(VisarError, match="is not finished"):
        RunFolder(tmp_path / "own").finished()


# Other runs


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"seed": 6}, "seed was 5, now 6"),
        ({"sampler": "ar"}, "sampler was scd, now ar"),
        ({"sampler": SpeculativeJacobi(coupling="maximal", window=8)}, "window was 16, now 8"),
        ({"batch": 6}, "batch was 3, now 6"),
        ({"tokens": False}, "tokens was True, now False"),
        ({"temperature": 0.5}, "temperature was 1.0, now 0.5"),
        ({"guidance_scale": 3.0}, "guidance_scale was 2.0, now 3.0"),
        ({"drafters": ["x"]}, r"drafters was \[\], now \['x'\]"),
        ({"top_k": 3, "top_p": 0.5}, r"top_k was 0, now 3; top_p was 1.0, now 0.5"),
    ],
)
def test_other_settings_are_refused(
    go: Callable[..., Any], whole: Path, tmp_path: Path, other: dict[str, Any], difference: str
) -> None:
    unfinished(whole, tmp_path / "own", 3)
    before = names(tmp_path / "own")
    with pytest.raises(VisarError, match=rf"holds a run with other settings: {difference}\.$"):
        go(**other)
    assert names(tmp_path / "own") == before


def test_other_prompts_and_weights_are_refused(
    text_pipe: TextToImagePipeline, whole: Path, go: Callable[..., Any], tmp_path: Path
) -> None:
    unfinished(whole, tmp_path / "own", 3)
    for conditions in (PROMPTS[::-1], [Condition(p, i) for i, p in enumerate(PROMPTS)]):
        with pytest.raises(VisarError, match="other settings: sha256 was "):
            sample_images(text_pipe, conditions, tmp_path / "own", count=7, batch=3, seed=5, tokens=True)
    with torch.no_grad():
        text_pipe.vq.post_quant_conv.weight[0, 0] += 1e-3  # of the decoder: no token would tell
    with pytest.raises(VisarError, match="other settings: weights was "):
        go()


def test_another_machine_is_a_note(
    go: Callable[..., Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished(whole, tmp_path / "own", 3)
    about = json.loads((whole / "run.json").read_text())
    threads = about["machines"][0]["threads"]
    about["machines"][0]["threads"] = threads + 1
    (tmp_path / "own" / "run.json").write_text(json.dumps(about))
    with pytest.warns(
        UserWarning, match=rf"continues on another machine \(threads was {threads + 1}, now {threads}\): rounding"
    ):
        go()
    machines = json.loads((tmp_path / "own" / "run.json").read_text())["machines"]
    assert [m["threads"] for m in machines] == [threads + 1, threads]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go()


def test_a_manifest_of_something_else_is_safe(go: Callable[..., Any], whole: Path, tmp_path: Path) -> None:
    """And that of a run whose images are gone is its own, also after a stop before the first is drawn again."""
    manifest = tmp_path / "own" / "manifest.jsonl"
    manifest.parent.mkdir()
    manifest.write_text("mine\n")
    with pytest.raises(VisarError, match=r"holds a manifest\.jsonl of something else; give another folder"):
        go()
    assert manifest.read_text() == "mine\n" and [p.name for p in manifest.parent.iterdir()] == [manifest.name]
    shutil.rmtree(manifest.parent)
    shutil.copytree(whole, manifest.parent)
    for image in manifest.parent.glob("*.png"):
        image.unlink()

    def stopped(_: object) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(crew=stopped)
    assert go().sampled == 7 and images(manifest.parent) == images(whole)


def test_images_of_something_else_are_safe(go: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "000000.png").write_bytes(b"mine")
    with pytest.raises(VisarError, match="holds images of something else; give another folder"):
        go()
    assert images(tmp_path / "own") == {"000000.png": b"mine"} and names(tmp_path / "own") == ["000000.png"]


def test_two_live_runs(go: Callable[..., Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused and touches nothing, and so is one of a job with fewer ranks; then the first goes on."""
    unfinished(whole, tmp_path / "own", 3)
    for rank in (0, 2):
        with RunFolder(tmp_path / "own").locked(rank, 3):
            (tmp_path / "own" / ".000003.7.partial.png").write_text("being written")
            before = names(tmp_path / "own")
            with pytest.raises(VisarError, match=r"Another run is at work in .*; wait until it ends, or give another"):
                go()
            assert [n for n in names(tmp_path / "own") if n != ".lock.0"] == [n for n in before if n != ".lock.0"]
    assert go().sampled == 4 and names(tmp_path / "own") == names(whole)


def test_a_damaged_description(go: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for text, message in (("{", "run.json: it is not valid JSON"), ("[]", "run.json: it should be an object")):
        (tmp_path / "own" / "run.json").write_text(text)
        with pytest.raises(VisarError, match=message):
            go()


def test_a_full_disk_is_one_sentence(
    go: Callable[..., Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Image.Image, *args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    unfinished(whole, tmp_path / "own", 3)
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(VisarError, match=r"^Cannot write to .*own: No space left on device\.$"):
            go()
    assert go().sampled == 4 and told(tmp_path / "own") == told(whole)
