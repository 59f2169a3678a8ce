"""What `visar generate` shows while it works, and what its files say of themselves."""

from __future__ import annotations

import io
import json
import os
import shlex
from pathlib import Path

import pytest
from PIL import Image

from visar.cli import main
from visar.cli.preview import Preview, bar, protocol
from visar.generation.model import ImageModel


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "form"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"), ({"TERM": "xterm", "TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM": "foot"}, "sixel"), ({"TERM": "xterm-256color"}, "blocks"), ({"TERM": "dumb"}, "none"), ({}, "none"),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, "blocks"),
    ],
)  # fmt: skip
def test_what_a_terminal_can_show(environment: dict[str, str], form: str) -> None:
    assert protocol(Terminal(), environment) == form and protocol(io.StringIO(), environment) == "none"


@pytest.mark.parametrize(
    ("form", "start"),
    [
        ("kitty", "\x1b_Ga=T,f=100"),
        ("iterm", "\x1b]1337;File=inline=1"),
        ("sixel", '\x1bPq"1;1;'),
        ("blocks", "\x1b[38;2;"),
    ],
)
def test_an_image_is_shown_in_one_place(form: str, start: str) -> None:
    stream = Terminal()
    preview, image = Preview(stream, form), Image.new("RGB", (4, 4), (200, 10, 10))
    preview.show(image, "first")
    once = stream.getvalue()
    assert start in once and once.endswith("first\n") and not once.startswith("\x1b[3A")
    preview.show(image, "second")
    lines = 3 if form == "blocks" else 9
    assert stream.getvalue()[len(once) :].startswith(f"\x1b[{lines}A")


def test_progress_without_a_terminal_is_lines() -> None:
    from tqdm import tqdm

    stream = io.StringIO()
    with tqdm(total=9, **(bar(stream) | {"delay": 0, "mininterval": 0})) as shown:  # type: ignore[call-overload]
        shown.update(3)
        shown.update(3)
    lines = stream.getvalue().splitlines()
    assert any(line.startswith("visar: 3 of 9 tokens, ") for line in lines) and "\r" not in stream.getvalue()


def test_files_say_how_they_were_made(text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.png"
    options = ["--model", str(text_folder), "--seed", "5", "--sampler", "scd", "--set", "window=4", "--top-k", "7"]
    assert main(["generate", "red heart", "-o", str(out), *options]) == 0
    capsys.readouterr()
    assert main(["info", str(out)]) == 0
    said = capsys.readouterr().out
    assert "scd (exact)" in said and "red heart" in said
    command = shlex.split(said.splitlines()[-1])
    assert main([*command[1:], "-o", str(tmp_path / "b.png")]) == 0
    assert Image.open(out).tobytes() == Image.open(tmp_path / "b.png").tobytes()
    capsys.readouterr()
    assert main(["info", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"] == {"seed": 5, "top_k": 7}


def test_images_that_were_rounded_in_a_batch(
    text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["generate", "red heart", "blue cat", "-n", "2", "--model", str(text_folder), "--dtype", "bfloat16"]
    assert main([*common, "-o", str(tmp_path / "a.png")]) == 0
    capsys.readouterr()
    for number, count in enumerate((1, 2, 1, 2)):
        assert main(["info", str(tmp_path / f"a-{number}.png")]) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[-1].startswith("It may make another image: bfloat16") and f"4 in this file and {count}" in said[-1]
    assert main(["info", str(tmp_path / "a-0.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["note"] == said[-1].replace("and 2 in", "and 1 in")


@pytest.mark.parametrize("text", [None, "{", "[]", '{"model": 1}'])
def test_files_that_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if text is not None:
        info.add_text("visar", text)
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png", pnginfo=info)
    assert main(["info", str(tmp_path / "x.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_is_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, said in (
        (tmp_path / "none.png", "There is no file {}."),
        (tmp_path, "Cannot read {}: it is a folder."),
        (tmp_path / "pipe", "Cannot read {}: it is not a regular file."),
        (Path("/dev/zero"), "Cannot read {}: it is not a regular file."),
    ):
        assert main(["info", str(path)]) == 2
        assert capsys.readouterr().err == f"visar: error: {said.format(path)}\n"


def test_scale_and_grid(text_folder: Path, tmp_path: Path) -> None:
    common = ["generate", "red heart", "-n", "3", "--model", str(text_folder)]
    assert main([*common, "-o", str(tmp_path / "one.png"), "--grid", "--scale", "3"]) == 0
    assert main([*common, "-o", f"{tmp_path}/all/"]) == 0
    side = Image.open(tmp_path / "all" / "red-heart.png").width
    grid = Image.open(tmp_path / "one.png")
    assert grid.size == (6 * side, 6 * side)
    first = grid.resize((2 * side, 2 * side), Image.Resampling.NEAREST).crop((0, 0, side, side))
    assert first.tobytes() == Image.open(tmp_path / "all" / "red-heart.png").tobytes()


@pytest.mark.parametrize("what", [["red heart", "-blue cat"], ["--class", "3", "--class", "5"]])
def test_the_command_of_a_grid(
    text_folder: Path, class_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: list[str]
) -> None:
    model = ["--model", str(class_folder if "--class" in what else text_folder)]
    out, again = tmp_path / "grid.png", tmp_path / "again.png"
    common = ["-n", "2", "--grid", "--scale", "2", *model, "-o", str(out)]
    assert main(["generate", *common, *(what if "--class" in what else ["--", *what])]) == 0
    capsys.readouterr()
    assert main(["info", str(out)]) == 0
    *rows, last = capsys.readouterr().out.splitlines()
    found = [line.split(maxsplit=1) for line in rows]
    wanted = [["class", "3"], ["class", "5"]] if "--class" in what else [["prompt", p] for p in what]
    assert found[1:3] == wanted and found[-2:] == [["grid", "4 images"], ["scale", "2"]]
    with Image.open(out) as image:
        assert image.info["Description"] == ("class 3; class 5" if "--class" in what else "red heart; -blue cat")
    assert main(["generate", "-o", str(again), *shlex.split(last)[2:]]) == 0
    assert again.read_bytes() == out.read_bytes()


def test_files_that_could_not_be_read_again_are_refused(
    text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    side = sum(ImageModel.load(text_folder).family.pixels) // 2
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3 * side**2)
    monkeypatch.delattr(ImageModel, "generate")  # they are, before anything is decoded
    common = ["generate", "red heart", "-n", "7", "--model", str(text_folder), "-o", str(tmp_path / "a.png")]
    for options, width, cure in (
        (["--scale", "3"], 3, "give a smaller --scale"), (["--grid"], 3, "leave out --grid"),
        (["--grid", "--scale", "2"], 6, "give a smaller --scale"),
    ):  # fmt: skip
        assert main([*common, *options]) == 2
        assert capsys.readouterr().err == (
            f"visar: error: The file would have {width * side} x {width * side} pixels, of which Pillow reads "
            f"{6 * side**2} at most; {cure}.\n"
        )
    assert not list(tmp_path.iterdir())
