"""What every command does with its outputs: full disks, devices, links, odd encodings, and what a failure leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest

import visar.cli
from tests.helpers.devices import device
from tests.helpers.stepped import hears_interrupts
from visar.cli import main
from visar.cli.generate import as_typed, output_paths
from visar.errors import VisarError

Capture = pytest.CaptureFixture[str]


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "visar", *arguments]
    return subprocess.run(command, capture_output=True, env=os.environ | environment)


@pytest.mark.parametrize("arguments", [
    "models --json OUT", "eval protocols --json OUT", "bench --model MODEL -n 1 --json OUT", "verify --json OUT",
    "bench --model MODEL -n 1 --history OUT", "sample --model MODEL --prompts p.txt -o new --json OUT",
    "generate cat --model MODEL -o new/ --json OUT", "generate cat --model MODEL --force -o OUT",
    "sample --model MODEL --prompts p.txt -o new --npz OUT", "eval stats i --protocol icons-efflite0 -o OUT",
])  # fmt: skip
def test_outputs_are_checked_before_the_work(
    arguments: str, text_folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("this is the work")

    monkeypatch.chdir(tmp_path)
    # Every module is imported before any is patched, or it would keep the patch.
    for module in [import_module(f"visar.cli.{m.name}") for m in iter_modules(visar.cli.__path__)]:
        if hasattr(module, "load_model"):
            monkeypatch.setattr(module, "load_model", work)
    monkeypatch.setattr("visar.eval.exactness.joint.verify", work)
    Path("p.txt").write_text("cat\n")
    suffix = {"--force": ".png", "--npz": ".npz", "stats": ".npz"}
    end = next((s for word, s in suffix.items() if word in arguments), ".json")
    Path(f"folder{end}").mkdir()
    Path("file").touch()
    device(Path(f"full{end}"), "full")
    before = names(tmp_path)
    outs = ["folder", "full", "file/x", "made/" + "x" * 300]
    for out in outs[1 if "--force" in arguments else 0 :]:  # images go into a folder
        words = arguments.replace("OUT", out + end).replace("MODEL", str(text_folder)).split()
        assert main(words) == 2, words
        err = capsys.readouterr().err
        assert err.startswith("visar: error: Cannot write ") and err.count("\n") == 1, (words, err)
        assert names(tmp_path) == before and Path(f"full{end}").lstat().st_size == 0


def test_json_goes_through_a_device(tmp_path: Path, capsys: Capture) -> None:
    path = device(tmp_path / "null.txt", "null")  # also by another name than .json
    before = path.lstat().st_ino
    assert run("models", "--json", path) == 0 and path.lstat().st_ino == before
    capsys.readouterr()
    assert run("samplers", "--json", "/dev/stdout") == 0
    assert json.loads(capsys.readouterr().out)[0]["name"]


@pytest.mark.parametrize("name, message", [
    ("run/run.json", "--json would replace run.json, which describes a run of `visar sample`"),
    ("captions.json", "--json would replace {tmp}/captions.json, which is given for something else"),
])  # fmt: skip
def test_json_replaces_nothing_that_is_needed(name: str, message: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "link.json"
    path.symlink_to(tmp_path / name)
    assert run("eval", "clip", tmp_path, "--captions", tmp_path / "captions.json", "--json", path) == 2
    assert message.format(tmp=tmp_path) in capsys.readouterr().err and names(tmp_path) == ["link.json"]


def test_a_full_stdout_is_one_sentence(tmp_path: Path) -> None:
    with open(device(tmp_path / "full", "full"), "wb") as full:
        done = subprocess.run([sys.executable, "-m", "visar", "models"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "visar: error: No space left on device.\n")


def test_images_are_written_together_or_not(
    text_folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    save, left = Image.Image.save, [1]

    def full(image: Image.Image, path: Path, **_: object) -> None:
        if not left:
            raise OSError(28, "No space left on device")
        left.pop()
        save(image, path)

    monkeypatch.setattr(Image.Image, "save", full)
    assert run("generate", "cat", "-n", 2, "--model", text_folder, "-o", tmp_path / "new") == 2
    err = capsys.readouterr().err
    assert err == f"visar: error: Cannot write {tmp_path / 'new' / 'cat-1.png'}: No space left on device.\n"
    assert names(tmp_path) == []


def test_names_of_many_images_take_no_time(tmp_path: Path) -> None:
    (tmp_path / "cat-7.png").touch()
    start = time.process_time()
    paths = output_paths(str(tmp_path), ["cat"] * 5000 + ["cat 1"] * 5000)
    assert time.process_time() - start < 5  # minutes, where each name looks through those before it
    assert len(set(paths)) == 10000 and tmp_path / "cat-7.png" not in paths
    assert [p.name for p in paths[:2]] == ["cat.png", "cat-1.png"]


def test_a_folder_may_look_like_a_file(tmp_path: Path) -> None:
    for out in (f"{tmp_path}/out_v1.0/", f"{tmp_path}/out_v1.0", f"{tmp_path}/a.jpg/"):
        assert output_paths(out, ["cat"]) == [Path(out) / "cat.png"]
    for out in (f"{tmp_path}/a.jpg", f"{tmp_path}/a.v1"):
        with pytest.raises(VisarError, match=r"give a \.png file, or a folder, with a / at its end"):
            output_paths(out, ["cat"])


def test_more_images_than_a_call_takes(tmp_path: Path, capsys: Capture) -> None:
    assert run("generate", "cat", "-n", 10**9, "-o", tmp_path / "new") == 2
    assert "10000 at most, not 1000000000; use `visar sample`" in capsys.readouterr().err and names(tmp_path) == []


@pytest.mark.parametrize("arguments", ["generate cat\udcff", "generate cat -o {}", "models {}"])
def test_a_megabyte_in_an_error(arguments: str, capsys: Capture) -> None:
    assert main([word.format("x" * 1_000_000) for word in arguments.split()]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and len(err) < 1200 and err.endswith(".\n")


def test_text_of_other_encodings(tmp_path: Path) -> None:
    assert as_typed("caf\xe9") == "caf\xe9" and as_typed("cat \udcff") == "cat \udcff"
    assert as_typed("💩".encode().decode("ascii", "surrogateescape")) == "💩"
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = shell("models", "💩\u2265", **plain)
    assert done.returncode == 2 and done.stderr.startswith(b"visar: error: Unknown model '") and b"\\" in done.stderr
    done = shell("generate", "cat \udcff")
    assert done.returncode == 2 and b"'cat \\udcff' is no valid text" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number, seconds", [
    (signal.SIGINT, 2.0), (signal.SIGINT, 4.0), (signal.SIGINT, 8.0), (signal.SIGTERM, 8.0),
])  # fmt: skip
def test_an_interrupt_at_any_time(number: signal.Signals, seconds: float, tmp_path: Path) -> None:
    # From the moment that it runs: on a busy machine Python itself may take seconds to start.
    begun = "import sys; from visar.cli import main; print('begun', flush=True); sys.exit(main())"
    command = [sys.executable, "-c", begun, "generate", "cat", "-n", "500", "-o", str(tmp_path / "new")]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hears_interrupts
    )
    assert child.stdout is not None and child.stdout.readline() == "begun\n"
    time.sleep(seconds)
    err = ""
    for _ in range(9):  # a library that is being imported may swallow one
        child.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            _, err = child.communicate(timeout=20)
            break
    child.kill()
    said = "terminated" if number is signal.SIGTERM else "interrupted"
    assert child.returncode == 128 + number and err.endswith(f"visar: {said}\n") and "Traceback" not in err
    assert names(tmp_path) == []
