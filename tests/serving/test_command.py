"""`visar serve` on the command line: help, bad input, and what it serves."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers import tiny_chameleon
from visar.cli import main
from visar.serving.server import Server

Refusal = Callable[..., str]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refusal:
    """What the command says to input that it does not take: one sentence, exit code 2, nothing served."""

    def runs(*_: Any) -> None:
        raise AssertionError("It was served all the same.")

    monkeypatch.setattr(Server, "run", runs)

    def refused(*arguments: object) -> str:
        assert main(["serve", *map(str, arguments)]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("visar: error: ") and said.err.count("\n") == 1
        return said.err.removeprefix("visar: error: ").strip()

    return refused


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom visar.cli import main\ntry:\n    main(['serve', '--help'])\nexcept SystemExit as e:\n"
        "    assert e.code == 0\nheavy = {'fastapi', 'torch', 'uvicorn', 'pydantic', 'diffusers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for option in [
        "--model",
        "--sampler",
        "--window",
        "--rows",
        "--waiting",
        "--api-key-file",
        "--deadline",
        "--drain",
    ]:
        assert option in done.stdout


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "sse_starlette", "prometheus_client"])
@pytest.mark.parametrize("command", [["serve"], ["bench", "--serve"]], ids=["serve", "bench"])
def test_without_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, missing: str, command: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(command) == 2 and "'visar[serve]'" in capsys.readouterr().err


def test_without_ray(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert refusal("--port", 0, "--ray") == "This needs Ray: pip install 'visar[cluster]'."


def test_bad_addresses(refusal: Refusal) -> None:
    assert refusal("--port", 65536) == "--port must be from 0 (any that is free) to 65535, not 65536."
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "Address already in use" in refusal("--port", taken.getsockname()[1])
    assert "There is no address" in refusal("--host", "no.such.host.invalid")
    assert "is no name of a host" in refusal("--port", 0, "--allowed-host", "http://x")


def test_bad_keys(refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys.txt"
    assert "There is no" in refusal("--api-key-file", file)
    for text, said in (("\n \n", "has no API key"), ("short\n", "8 or more"), ("long enough key\n", "no space")):
        file.write_text(text)
        assert said in (told := refusal("--api-key-file", file)) and "enough" not in told  # no key is shown
    monkeypatch.setenv("VISAR_API_KEY", "short")
    assert "8 or more" in refusal()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--sampler", "mar"), "mar"), (("--sampler", "nix"), "Unknown sampler 'nix'"),
        (("--sampler", "eagle"), "needs a drafter"), (("--sampler", "ar", "--window", 4), "None of these samplers has"),
        (("--set", "gamma=1"), "gamma"), (("--rows", 0), "--rows must be 1 or more"),
        (("--deadline", 0), "--deadline must be above 0"), (("--max-images", 0), "--max-images must be 1 or more"),
        (("--model", "ikons"), "ikons"),
        (("--rows", 2, "--waiting", 1, "--max-images", 4), "more than --rows and --waiting have room for, 3"),
    ],
)  # fmt: skip
def test_bad_settings(refusal: Refusal, text_folder: Path, options: tuple[object, ...], said: str) -> None:
    model = () if "--model" in options else ("--model", text_folder)
    assert said in refusal("--port", 0, *model, *options)


def test_a_model_that_makes_no_pixels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "run", lambda *_: None)
    tiny_chameleon.save(tmp_path / "anole", lumina=False)
    (tmp_path / "anole" / "tokenizer" / "vqgan.ckpt").unlink()
    assert main(["serve", "--port", "0", "--model", str(tmp_path / "anole")]) == 2
    assert "has no decoder of pixels" in capsys.readouterr().err


def test_a_cluster_on_which_it_does_not_start(
    text_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left there. Paths are given in full, and who may use it is said before."""
    told: list[str] = []
    loads: list[Any] = []

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no room")

    serve = SimpleNamespace(
        status=lambda: SimpleNamespace(proxies={}), start=lambda **_: told.append("start"), run=fails,
        shutdown=lambda: told.append("shutdown"),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(serve=serve))
    monkeypatch.setattr("visar.cluster.connected", lambda _: nullcontext())
    monkeypatch.setattr("visar.serving.fleet.application", lambda load, _: loads.append(load))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.chdir(text_folder.parent)
    assert main(["serve", "--ray", "--host", "0.0.0.0", "--port", "0", "--model", text_folder.name]) == 2
    said = capsys.readouterr().err
    assert "could not be started: no room" in said and "everybody who reaches this address" in said
    assert told == ["start", "shutdown"] and loads[0].args[0].models == [str(text_folder)]


def test_what_is_served(text_folder: Path, class_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each model has the samplers that were asked for, the first of which is its default; equal names get numbers."""
    served: list[Any] = []

    def run(server: Server, sockets: Any) -> None:
        app: Any = server.config.app
        served.append(app.state.studio)

    monkeypatch.setattr(Server, "run", run)
    words = ["serve", "--port", "0", "--window", "4", "--sampler", "sjd:window=3", "--sampler", "scd"]
    for folder in (text_folder, class_folder, text_folder):
        words += ["--model", str(folder)]
    assert main(words) == 0
    cards = served[0].cards
    assert list(cards) == ["text", "class", "text-2"]
    assert {name: s.window for name, s in cards["class"].samplers.items()} == {"sjd:window=3": 3, "scd": 4}
    assert cards["text"].sampler == "sjd:window=3" and served[0].engine.rows == 8
