"""Hostile arguments for every option of every command, which are taken from the parser itself.

Whatever is given, a command ends with 0 or 2 (or 1, where a check fails), an error is one sentence, and a command that
fails leaves no file. What takes minutes stands aside: it says so with an error of its own, after all checks before it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.devices import device
from visar.cli import main, parser
from visar.cli.parsers.base import CommandParser
from visar.errors import LONGEST, VisarError

pytestmark = pytest.mark.slow
CASES = 60  # of each command
ROWS = 8  # images that are decoded at most
NUMBERS = (
    "0", "-1", "1", "2", "3", "7", "1.5", "-0.0", "1e-320", "1e308", "1e400", "nan", "inf", "-inf", "2147483648",
    "-9223372036854775809", "18446744073709551616", "9" * 30, "9" * 5000, "x", "０", "1_0", " 3", "0x10", "random",
)  # fmt: skip
TEXTS = (
    "", " ", "\N{PILE OF POO}", "a\u2028b", "\udcff", "\0", "zebra" * 300_000, "line\nline", "--", "-", "-1", "=",
    ",", "a=b=c", "=1", "window=9999999999999999999999", "window=nan", "ar,scd", "ar:window=0", "icons",
    "../x", "x.py:make", "http://127.0.0.1:9/x", "cuda:99", "meta", "0-999999999999", "1,1", "5-1",
)  # fmt: skip
PATHS = (
    "", ".", "/", "..", "missing", "missing/deep/x.json", "new.json", "new.png", "new.npz", "new.txt", "file", "folder",
    "file/x.json", "folder.json", "folder/", "out_v1.0/", "x" * 300 + ".json", "x" * 300, "\udcff.json", "-", "~/x",
    "☃.png", "null.json", "null.png", "full", "full/x", "/proc/self/x.json", "full.json", "link.json", "images",
    "dangling.json", "loop.json", "empty.json", "bad.json", "deep.json", "list.json", "coco.json", "utf16.txt", "mixed",
    "binary.txt", "prompts.txt", "nul.txt", "prompts.jsonl", "null.jsonl", "run", "bad.npz", "bad.png", "bad.zip",
    "x.py:make",
)  # fmt: skip
BASE = {  # what a command needs, so that one bad argument reaches the command
    "generate": ["cat", "--model", "MODEL", "-o", "out"],
    "sample": ["--prompts", "prompts.txt", "--model", "MODEL", "-o", "out"],
    "export": ["run", "--layout", "npz", "-o", "out.npz"],
    "demo": ["--model", "MODEL", "--port", "0"],
    "serve": ["--model", "MODEL", "--port", "0"],
    "info": ["images/0.png"], "models": [], "samplers": [], "verify": ["--sequences", "16384"], "completion": ["bash"],
    "bench": ["--model", "MODEL", "-n", "1", "--repeats", "1"],
    "eval fid": ["images", "--protocol", "icons-efflite0", "--reference", "images"],
    "eval clip": ["images", "--protocol", "icons-clip"],
    "eval stats": ["images", "--protocol", "icons-efflite0", "-o", "out.npz"],
    "eval compare": ["images", "images"],
    "eval report": ["--model", "MODEL", "-n", "1", "-o", "out"],
    "eval protocols": [],
    "train images": ["-o", "out"],
    "train words": ["--data", "images", "-o", "out"],
    "train tokenizer": ["--data", "images", "-o", "out"],
    "train autoencoder": ["--data", "images", "-o", "out"],
    "train ar": ["--data", "images", "--tokenizer", "MODEL/vq", "--words", "MODEL/text_encoder", "-o", "out"],
    "train two-way": ["--init", "MODEL/gpt", "--data", "images", "--tokenizer", "MODEL/vq", "--words",
                      "MODEL/text_encoder", "-o", "out"],
    "train jacobi": ["--model", "MODEL", "--captions", "prompts.txt", "-o", "out"],
    "train mar": ["--data", "images", "--autoencoder", "MODEL/vq", "--words", "MODEL/text_encoder", "-o", "out"],
    "train clip": ["--data", "images", "--words", "MODEL/text_encoder", "-o", "out"],
    "train drafter": ["--model", "MODEL", "--captions", "prompts.txt", "-o", "out"],
    "train assemble": ["--gpt", "MODEL/gpt", "--tokenizer", "MODEL/vq", "--words", "MODEL/text_encoder", "-o", "out"],
}  # fmt: skip


def leaves(top: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, CommandParser]]:
    """The commands that do something, by name."""
    below = [a for a in top._actions if isinstance(a, argparse._SubParsersAction)]
    if not below:
        yield name, top  # type: ignore[misc]
    for action in below:
        for word, command in action.choices.items():
            yield from leaves(command, f"{name} {word}".strip())


COMMANDS = dict(leaves(parser()))


def values_of(action: argparse.Action) -> tuple[str, ...]:
    """What is tried for an option: numbers where it takes one, its choices, files, and texts."""
    if action.choices is not None:
        return (*map(str, action.choices), "", "none")
    if {"FILE", "FOLDER", "PATH", "LIST", "FOLDER_A", "FOLDER_B"} & set(str(action.metavar).split("|")):
        return PATHS + TEXTS
    return NUMBERS if _number(action.type) else TEXTS + PATHS


def _number(kind: Any) -> bool:
    for text in ("1", "16384"):
        try:
            return isinstance(kind(text), int | float)
        except (TypeError, argparse.ArgumentTypeError, VisarError):
            pass
    return False


def case(command: str, rng: random.Random) -> list[str]:
    """A command line: what the command needs, with one to three options more or instead."""
    given = list(BASE[command])
    chosen = rng.sample(actions := [a for a in COMMANDS[command]._actions if a.dest != "help"], min(len(actions), 3))
    for action in chosen[: rng.choice((1, 1, 1, 2, 3))]:
        value = [] if action.nargs == 0 else [rng.choice(values_of(action))]
        if action.option_strings:
            flag = rng.choice(action.option_strings)
            given += [f"{flag}={value[0]}"] if value and flag.startswith("--") else [flag, *value]
        elif rng.random() < 0.5 and given and not given[0].startswith("-"):
            given[: len(value)] = value
        else:
            given = [*value, *given]
    return [*command.split(), *given]


def sandbox(folder: Path) -> None:
    """The files that `PATHS` names."""
    texts = {
        "file": "x", "x.py": "raise RuntimeError('mine')", "empty.json": "", "bad.json": "{", "list.json": '["cat"]',
        "deep.json": "[" * 100_000, "prompts.txt": "cat\nred\n", "prompts.jsonl": '{"prompt": "cat", "id": "a"}\n',
        "null.jsonl": '{"prompt": null}\n', "bad.npz": "x", "bad.png": "x", "bad.zip": "PK", "nul.txt": "c\0a\0t\0",
        "coco.json": json.dumps({"images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"id": 1}]}),
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "utf16.txt").write_bytes("cat\nred\n".encode("utf-16"))
    (folder / "binary.txt").write_bytes(bytes(range(128, 256)))
    for name in ("folder", "folder.json", "images", "mixed", "run"):
        (folder / name).mkdir()
    for name, target in (("link.json", "list.json"), ("dangling.json", "gone/x.json"), ("loop.json", "loop.json")):
        (folder / name).symlink_to(target)
    for name in ("null.json", "null.png", "full", "full.json"):
        device(folder / name, name.partition(".")[0])
    for at in ("images", "mixed"):
        for i in range(3):
            Image.new("RGB", (16, 16), (i, 0, 0)).save(folder / at / f"{i}.png")
            (folder / at / f"{i}.txt").write_text("cat")
    Image.new("RGB", (16, 16)).save(folder / "mixed" / "9.gif")
    (folder / "mixed" / "notes.doc").write_text("x")
    (folder / "run" / "run.json").write_text('{"count": 1}')
    (folder / "run" / "manifest.jsonl").write_text('{"id": "000000", "file": "../file"}\n')


def aside(*_: Any, **__: Any) -> Any:
    raise VisarError("This takes minutes.")


def nowhere(**_: Any) -> Any:
    raise ConnectionError("Timed out")


@pytest.fixture
def place(text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The sandbox as the current folder, and stand-ins for what takes minutes, a network or a network's weights."""
    from visar.generation.model import ImageModel

    (here := tmp_path / "here").mkdir()
    sandbox(here)
    (here / "MODEL").symlink_to(text_folder)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    generate = ImageModel.generate

    def few(self: ImageModel, conditions: Any, *args: Any, num_images: int = 1, **more: Any) -> Any:
        if len(conditions) * num_images > ROWS:
            aside()
        return generate(self, conditions, *args, num_images=num_images, **more)

    monkeypatch.setattr(ImageModel, "generate", few)
    for module, names in {
        "eval.benchmark.speed": ["compare"], "eval.benchmark.profiling": ["profile_model"],
        "eval.benchmark.shapes": ["measure"], "eval.exactness.joint": ["verify"],
        "eval.exactness.continuous": ["verify_continuous"], "eval.exactness.own_model": ["verify_files"],
        "eval.quality.extractors": ["get_extractor"], "eval.quality.measure": ["get_extractor"],
        "eval.report.make": ["make_report"], "training.images": ["_fetchable"],
        "training.words": ["build_word_encoder"],
        "training.self_generated": ["generate_tokens"], "training.tokenizer": ["train_tokenizer"],
        "training.autoencoder": ["train_autoencoder"], "training.ar": ["train_ar"], "training.mar": ["train_mar"],
        "training.two_way": ["train_two_way"],
        "training.clip": ["train_clip"],
    }.items():  # fmt: skip
        for name in names:
            monkeypatch.setattr(f"visar.{module}.{name}", aside)
    page = types.ModuleType("visar.demo.app")  # without Gradio, which takes seconds
    vars(page).update(build=aside, HEAD="", theme=aside, written=aside)
    monkeypatch.setitem(sys.modules, "visar.demo.app", page)
    unreachable = types.SimpleNamespace(is_initialized=bool, shutdown=bool, init=nowhere)
    monkeypatch.setattr("visar.cluster.ray_module", lambda: unreachable)
    monkeypatch.setattr("visar.cluster.STARTS", 1)
    monkeypatch.setattr("visar.cli.demo.load_model", lambda options: None)
    monkeypatch.setattr("visar.serving.server.Server.run", lambda server, sockets: None)
    monkeypatch.setattr("visar.serving.load.measure_load", aside)
    return here


def files(folder: Path) -> dict[str, str]:
    """All that is in the sandbox, by name."""
    out = {}
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        content += os.readlink(path).encode() if path.is_symlink() else b""
        content += oct(path.lstat().st_mode).encode()
        out[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return out


def test_every_command_is_tried() -> None:
    assert BASE.keys() == COMMANDS.keys()


@pytest.mark.parametrize("command", BASE)
def test_hostile_arguments(command: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(command)
    before = files(place)
    for _ in range(CASES):
        arguments = case(command, rng)
        told = [a if len(a) < 200 else f"{a[:80]}...({len(a)})" for a in arguments]
        try:
            code = main(arguments)
        except SystemExit as done:  # --version and --help
            code = done.code
        except BaseException as error:
            raise AssertionError(f"{told} raised {type(error).__name__}: {error}") from error
        err = capfd.readouterr().err
        assert code in (0, 1, 2), told
        last = err.splitlines()[-1] if err else ""
        assert all(len(line) < LONGEST + 200 for line in err.splitlines()), told
        if code == 2:
            assert last.startswith("visar: error: ") and last.endswith((".", "?")), (told, last)
            now = files(place)
            assert now == before, (told, last, {k for k in {*now, *before} if now.get(k) != before.get(k)})
        before = files(place)
