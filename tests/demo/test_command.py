"""`visar demo` without a browser: its answers to bad input, its server on the machine, and its end."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import visar
from tests.helpers.stepped import LONG, hears_interrupts, held
from tests.helpers.web import Visitor, get, image_in, serving
from visar.cli import main
from visar.recipe import Recipe

Capture = pytest.CaptureFixture[str]
REPOSITORY = Path(visar.__file__).parent.parent


def refusal(capsys: Capture, *arguments: object) -> str:
    """What `visar demo` says to input that it does not take: one sentence, exit code 2, nothing served."""
    assert main(["demo", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("visar: error: ") and said.err.count("\n") == 1
    return said.err.removeprefix("visar: error: ").strip()


# Bad input


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom visar.cli import main\ntry:\n    main(['demo', '--help'])\nexcept SystemExit as e:\n"
        "    assert e.code == 0\nheavy = {'gradio', 'torch', 'matplotlib', 'diffusers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 0, done.stderr
    for option in ("--model", "--host", "--port", "--share", "--max-images", "--max-waiting", "--drafter", "--vq"):
        assert option in done.stdout


@pytest.mark.parametrize("missing", ["gradio", "matplotlib"])
def test_without_the_extra(capsys: Capture, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    what = "pip install gradio matplotlib, or visar with its extra, 'visar[demo]'"
    assert refusal(capsys) == f"The demo needs Gradio and matplotlib: {what}."


@pytest.fixture
def launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import gradio

    def launch(*_: Any, **__: Any) -> None:
        raise AssertionError("It was served all the same.")

    monkeypatch.setattr(gradio.Blocks, "launch", launch)


@pytest.fixture
def loads_nothing(monkeypatch: pytest.MonkeyPatch, launches_nothing: None) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("A model was loaded before the rest was looked at.")

    monkeypatch.setattr("visar.cli.demo.load_model", load)


@pytest.mark.usefixtures("loads_nothing")
def test_bad_addresses(capsys: Capture) -> None:
    for port in (-1, 65536, 10**9):
        assert refusal(capsys, "--port", port) == f"--port must be from 0 (any that is free) to 65535, not {port}."
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refusal(capsys, "--port", port)
        assert said == f"Cannot listen on 127.0.0.1:{port} (Address already in use); use another --port."
    for host in ("no.such.host.invalid", "a..b", "x" * 70):
        assert refusal(capsys, "--host", host) == (
            f"There is no address {host!r} to listen on; --host takes one of this machine."
        )
    assert refusal(capsys, "--host", "203.0.113.7") == (  # kept for documentation: nobody has it
        "203.0.113.7 is no address of this machine; --host takes one that is."
    )
    for option in ("--max-images", "--max-waiting"):
        assert refusal(capsys, option, 0) == f"{option} must be 1 or more, not 0."
    assert refusal(capsys, "--port", "http") == "--port must be a whole number, not 'http'."


@pytest.mark.usefixtures("launches_nothing")
def test_bad_models(
    capsys: Capture, text_folder: Path, class_folder: Path, drafters: list[Path], tmp_path: Path
) -> None:
    def says(*arguments: object) -> str:
        return refusal(capsys, "--port", 0, *arguments)

    assert "icons" in says("--model", "ikons") and "ikons" in says("--model", "ikons")
    assert "is not a saved pipeline" in says("--model", tmp_path)
    (tmp_path / "c2i_B_384.pt").write_bytes(b"")
    assert str(tmp_path) in says("--model", tmp_path / "c2i_B_384.pt")
    assert "is served alone" in says("--vq", "vq.pt")  # of the two that are served by default
    assert "is served alone" in says("--model", text_folder, "--model", tmp_path / "c2i_B_384.pt", "--vq", "vq.pt")
    assert says("--drafter", drafters[0]) == "A drafter is for one model; give one --model."
    assert "drafter" in says("--model", class_folder, "--drafter", drafters[-1]).lower()
    assert str(tmp_path / "none") in says("--model", text_folder, "--drafter", tmp_path / "none")
    assert "are given with a published file" in says("--model", text_folder, "--image-size", 256)
    assert "Unknown device" in says("--model", text_folder, "--device", "warp")


def test_published_files_without_their_tokenizer(
    capsys: Capture, launches_nothing: None, text_folder: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    weights = load_file(text_folder / "gpt" / "diffusion_pytorch_model.safetensors")
    torch.save({"model": weights}, tmp_path / "t2i.pt")
    assert "--vq FILE" in refusal(capsys, "--port", 0, "--model", tmp_path / "t2i.pt")


# The server


@pytest.fixture(scope="module")
def served(text_folder: Path) -> Iterator[str]:
    with serving(text_folder, "--max-per-address", "3") as address:
        yield address


def test_it_answers(served: str) -> None:
    status, page = get(served)
    assert status == 200 and b"<html" in page
    status, config = get(f"{served}/config")
    assert status == 200 and json.loads(config)["title"] == "visar"
    assert json.loads(get(f"{served}/gradio_api/info")[1]) == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_two_visitors_in_one_batch(served: str, text_pipe: Any) -> None:
    one, two = Visitor(served, "one"), Visitor(served, "two")
    with held() as go:
        for visitor, prompt, seed in ((one, "red heart", 1), (two, "blue cat", 2)):
            visitor.press("generate", Prompt=prompt, Seed=seed)
        go.set()
    for visitor, prompt, seed in ((two, "blue cat", 2), (one, "red heart", 1)):
        status, images, *_, used = visitor.results()
        assert "Done: " in status and f"{prompt}, seed {seed}" in images and used == seed
        assert image_in(images) == text_pipe(prompt, seed=seed).images[0].tobytes()


def test_the_file_says_how_it_was_made(served: str, tmp_path: Path, capsys: Capture) -> None:
    me = Visitor(served, "me")
    me.press("generate", Prompt="red heart", **{"Top k": 7})
    _, images, result, _, seed = me.results()
    file = tmp_path / "image.png"
    found = re.search(r'data:image/png;base64,([^"]+)" download="([^"]+)"', images)
    assert found and found[2] == f"red-heart-seed{seed}-scd.png" and f"<b data-seed>{seed}</b>" in result
    file.write_bytes(base64.b64decode(found[1]))
    recipe = Recipe.read(file)
    assert (recipe.prompt, recipe.sampler) == ("red heart", "scd") and recipe.settings == {"seed": seed, "top_k": 7}
    me.press("generate", Prompt="red heart", **{"Top k": 7})
    assert me.results()[4] != seed  # another one, of its own


# From start to end


WATCH = """
import socket, sys
real = socket.socket.connect, socket.getaddrinfo
def own(host):
    return host in (None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0") or str(host).startswith(("127.", "/"))
def connect(self, address):
    host = address[0] if isinstance(address, tuple) else address
    if not own(host):
        print("ELSEWHERE", host, flush=True)
    return real[0](self, address)
def getaddrinfo(host, *rest, **named):
    host = host.decode() if isinstance(host, bytes) else host
    if not own(host):
        print("ELSEWHERE", host, flush=True)
    return real[1](host, *rest, **named)
socket.socket.connect, socket.getaddrinfo = connect, getaddrinfo
from visar.cli import main
from visar.recipe import Recipe
sys.exit(main(["demo", "--port", "0", "--model", "icons"]))
"""


@pytest.mark.slow
def test_the_command_from_start_to_interrupt(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    environment |= {"GRADIO_ANALYTICS_ENABLED": "True", "GRADIO_TEMP_DIR": str(tmp_path / "temporary")}
    folder = tmp_path / "cwd"
    folder.mkdir()
    server = subprocess.Popen(
        [sys.executable, "-c", WATCH], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, preexec_fn=hears_interrupts,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        said = server.stdout.readline()
        found = re.fullmatch(r"visar demo: icons on (http://127\.0\.0\.1:\d+)/?\n", said)
        assert found, said
        assert get(found[1])[0] == 200 and get(f"{found[1]}/config")[0] == 200
        visitor = Visitor(found[1], "visitor")
        visitor.press("generate", Sampler="ar", Images=4)
        next(visitor.messages("process_generating"))  # it ends in the middle of a decoding
        server.send_signal(signal.SIGINT)
        rest, _ = server.communicate(timeout=LONG)
    finally:
        server.kill()
    assert server.returncode in (0, 130) and "Traceback" not in rest and "ELSEWHERE" not in rest, rest
    assert list(folder.iterdir()) == []  # nothing is left where it was started
