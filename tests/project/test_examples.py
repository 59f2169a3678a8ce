"""Every script and notebook of examples/ runs, and says and writes what its first lines promise."""

from __future__ import annotations

import json
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers import stand_ins

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


def test_all_are_run_and_listed() -> None:
    assert set(SCRIPTS) == {path.name for path in EXAMPLES.glob("*.py")}
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"]({name})" in readme for name in (*SCRIPTS, *NOTEBOOKS))
