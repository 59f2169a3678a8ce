"""Every script and notebook of examples/ runs, and says and writes what its first lines promise."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers import stand_ins
from visar.cli import parser

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = {
    "generate.py": ["a red heart, 3d", "a lion, noto"],
    "compare_samplers.py": ["scd", "sjd"],
    "watch_decoding.py": ["a lion, noto"],
    "many_images.py": ["made", "3"],
    "published_weights.py": ["c2i_L_384.pt", "vq_ds16_c2i.pt"],
}
MADE = {
    "generate.py": {"image-0.png", "image-1.png"},
    "watch_decoding.py": {"decoding.gif"},
    "many_images.py": {"made"},
    "published_weights.py": {"class-207.png", "class-360.png"},
}
# In place of `python`: it notes a command of training, and leaves what the next commands read.
TRAINER = """#!{python}
import os, pathlib, sys
given = sys.argv[1:]
if given[0] == "-c":
    os.execv("{python}", ["{python}", *given])
with open("{log}", "a") as log:
    log.write("\\t".join(given[2:]) + "\\n")
out = pathlib.Path(given[given.index("--out") + 1])
if given[3] == "drafter":
    out = out / given[given.index("--kind") + 1]
    if (out / "acceptance").exists() and "--acceptance" not in given:
        sys.exit("a drafter that has a head is trained no further")
made = out / ("acceptance" if "--acceptance" in given else "text_encoder")
made.mkdir(parents=True, exist_ok=True)
(made / "concepts.json").touch()
"""
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files of the published layouts."""
    folder = tmp_path_factory.mktemp("published")
    stand_ins.lay_down(folder)
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(
    name: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = SCRIPTS[name]
    if name == "published_weights.py":
        given = [str(request.getfixturevalue("files") / file) for file in given]
        stand_ins.two_heads(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *given])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert {path.name for path in tmp_path.iterdir()} == MADE.get(name, set())
    printed = capsys.readouterr().out
    if name == "compare_samplers.py":
        rows = [line.split() for line in printed.splitlines()[1:]]
        assert [row[:2] for row in rows] == [["scd", "True"], ["sjd", "True"]] and float(rows[0][2]) < float(rows[1][2])
    elif name == "watch_decoding.py":
        with Image.open("decoding.gif") as gif:
            assert f": {gif.n_frames - 1} passes for 256 tokens" in printed and gif.n_frames > 20
    elif name == "many_images.py":
        assert "000002 a green apple, flat " in printed
    else:
        assert "scd (exact)" in printed


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells run in order, and it is stored without outputs."""
    shown: list[Any] = []
    display = types.SimpleNamespace(display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=display, version_info=(9, 0)))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads((EXAMPLES / name).read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    namespace: dict[str, Any] = {"__name__": "notebook"}
    for cell in cells:
        exec(compile("".join(cell["source"]), f"{name}, {cell['id']}", "exec"), namespace)
    images = [s for s in shown if isinstance(s, Image.Image)]
    assert len(images) == 4 and all(len(image.getcolors(1 << 20) or ()) > 10 for image in images)
    figures = [s for s in shown if hasattr(s, "savefig")]
    assert len(figures) == 3 and len(shown) == 7


def test_training_goes_on_in_its_folder(tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "run"
    (python := tmp_path / "bin" / "python").parent.mkdir()
    python.write_text(TRAINER.format(python=sys.executable, log=log))
    python.chmod(0o755)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    for _ in range(2):
        command = ["bash", str(EXAMPLES / "train_icons.sh"), "images", str(out)]
        subprocess.run(command, env={**os.environ, "PATH": path}, check=True, capture_output=True)
        assert (out / "model" / "model" / "acceptance").exists() and (out / "model" / "eagle").exists()
    commands = [line.split("\t") for line in log.read_text().splitlines()]
    assert len(commands) == 2 * 14 and all(parser().parse_args(command).run for command in commands)


def test_all_are_run_and_listed() -> None:
    assert set(SCRIPTS) == {path.name for path in EXAMPLES.glob("*.py")}
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"]({name})" in readme for name in (*SCRIPTS, *NOTEBOOKS))
