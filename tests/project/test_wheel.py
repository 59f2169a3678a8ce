"""What is released: everything of the checkout is in the wheel, and the wheel works alone, away from the checkout."""

from __future__ import annotations

import email.message
import email.parser
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import visar

ROOT = Path(__file__).parents[2]
CODE = ("visar", "samplers", "kernels", "eval", "assets")  # folders that are installed; all but the first below it
LARGEST = 60_000_000  # bytes

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def ran(command: list[str | Path], **settings: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **settings)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def listed() -> list[str]:
    """What is in git: files, and the links by which folders next to visar/ are packages of it."""
    return [name for name in ran(["git", "ls-files", "-z"], cwd=ROOT).split("\0") if name]


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """Files of the checkout that are in git and not deleted."""
    return [name for name in listed() if (ROOT / name).is_file()]


def installed_name(name: str) -> str:
    return name if name.startswith("visar/") else f"visar/{name}"


def built(source: Path, out: Path, kind: str) -> Path:
    ran(["uv", "build", "--quiet", f"--{kind}", "--out-dir", out, source])
    (made,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


def content(wheel: Path) -> set[str]:
    """Names of a wheel's files."""
    with zipfile.ZipFile(wheel) as opened:
        return set(opened.namelist())


@pytest.fixture(scope="module")
def clean(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files, to build in."""
    folder = tmp_path_factory.mktemp("clean")
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in listed():
        if (ROOT / name).is_symlink():
            (folder / name).symlink_to(os.readlink(ROOT / name))
    return folder


@pytest.fixture(scope="module")
def wheel(clean: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(clean, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as opened:
        (name,) = [n for n in opened.namelist() if n.endswith(".dist-info/METADATA")]
        return email.parser.Parser().parsestr(opened.read(name).decode())


@pytest.fixture(scope="module")
def alone(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a program of an environment that holds the wheel and what it needs, in a folder and with nothing set."""
    folder = tmp_path_factory.mktemp("alone")
    unset = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    ran(["uv", "venv", "--quiet", "--python", version, folder / "env"], env=unset)
    limits = ROOT / "constraints.txt"
    ran(["uv", "pip", "install", "--quiet", "--python", folder / "env", "--constraint", limits, wheel], env=unset)
    (folder / "home").mkdir()
    (folder / "elsewhere").mkdir()

    def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(folder / "env" / "bin" / program), *map(str, arguments)],
            cwd=folder / "elsewhere",
            env={"PATH": os.defpath, "HOME": str(folder / "home"), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )

    return run


# What is in it


@pytest.mark.slow
def test_every_file_of_the_checkout_is_in_the_wheel(
    tracked: list[str], wheel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A package that pyproject.toml forgets, or data that no pattern names, is missing here."""
    expected = {installed_name(name) for name in tracked if name.split("/")[0] in CODE}
    found = {name for name in content(wheel) if ".dist-info/" not in name}
    assert expected - found == set() and found - expected == set()
    assert {"visar/py.typed", "visar/assets/icons/model_index.json", "visar/cli/__init__.py"} <= found
    size = wheel.stat().st_size
    with capsys.disabled():
        print(f" {wheel.name}: {size / 1e6:.1f} MB of {LARGEST / 1e6:.0f}", end="")
    assert size < LARGEST


@pytest.mark.slow
def test_metadata(metadata: email.message.Message, wheel: Path) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("visar", visar.__version__)
    assert wheel.name == f"visar-{visar.__version__}-py3-none-any.whl"
    assert metadata["Requires-Python"] == ">=3.10" and metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra", [])) == {"cluster", "demo", "docs", "eval", "serve", "train"}
    classifiers = metadata.get_all("Classifier", [])
    assert not any(c.startswith("License ::") for c in classifiers)  # the expression says it
    minors = {int(c.rpartition(".")[2]) for c in classifiers if re.fullmatch(r"Programming .* 3\.\d+", c)}
    assert min(minors) == 10 and minors == set(range(10, max(minors) + 1)) and sys.version_info.minor in minors
    needs = metadata.get_all("Requires-Dist", [])
    plain = {re.split(r"[<>=;\[ ]", need)[0] for need in needs if "extra ==" not in need}
    assert {"torch", "diffusers", "safetensors"} <= plain and not plain & {"gradio", "matplotlib", "timm", "mkdocs"}
    for extra, package in (("demo", "gradio"), ("demo", "matplotlib"), ("eval", "matplotlib"), ("train", "resvg-py")):
        assert any(need.startswith(package) and need.endswith(f'extra == "{extra}"') for need in needs), (
            extra,
            package,
        )
    assert metadata["Description-Content-Type"] == "text/markdown" and metadata.get_payload().startswith("# visar")


@pytest.mark.slow
def test_licences_and_entry_point(wheel: Path, metadata: email.message.Message) -> None:
    info = f"visar-{visar.__version__}.dist-info"
    assert metadata.get_all("License-File") == ["LICENSE", "NOTICE"]
    with zipfile.ZipFile(wheel) as opened:
        for name in ("LICENSE", "NOTICE"):
            assert opened.read(f"{info}/licenses/{name}") == (ROOT / name).read_bytes()
        assert opened.read(f"{info}/entry_points.txt").decode().split() == [
            "[console_scripts]",
            "visar",
            "=",
            "visar.cli:main",
        ]


@pytest.mark.slow
def test_the_sdist_has_the_checkout_and_makes_the_same_wheel(
    tracked: list[str], clean: Path, wheel: Path, tmp_path: Path
) -> None:
    sdist = built(clean, tmp_path / "sdist", "sdist")
    with tarfile.open(sdist) as opened:
        opened.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    again = built(source, tmp_path / "again", "wheel")
    assert content(again) == content(wheel)
    hidden = {name for name in tracked if name.startswith(".")}  # what git and CI read
    named = {n: (source / n, source / installed_name(n)) for n in tracked if n not in hidden}
    assert [n for n, places in named.items() if not any(p.is_file() for p in places)] == []


def test_the_changelog_begins_with_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert headings[0] == visar.__version__ and headings[-1] == "0.1.0" and len(headings) == len(set(headings))


# Alone


@pytest.mark.slow
def test_it_draws_from_another_folder(alone: Run, tmp_path: Path) -> None:
    where = alone("python", "-c", "import visar; print(visar.__file__)").stdout
    assert "alone" in where and str(ROOT) not in where
    image = tmp_path / "heart.png"
    done = alone("visar", "generate", "a red heart, 3d", "--seed", "1", "--sampler", "scd", "--json", "-o", image)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["sampler"], told["tokens"]) == ("scd", 256) and 16 <= told["nfe"] < 257
    image = Image.open(image).convert("RGB")
    assert image.size == (128, 128) and image.getpixel((0, 0)) > (230, 230, 230)  # type: ignore[operator]
    red, green, _ = image.getpixel((64, 56))  # type: ignore[misc]
    assert red > 150 and green < 120  # a red heart on white


@pytest.mark.slow
def test_it_says_what_it_is(alone: Run) -> None:
    for command in (("visar",), ("python", "-m", "visar")):
        assert alone(*command, "--version").stdout == f"visar {visar.__version__}\n"
        done = alone(*command, "--help")
        assert done.returncode == 0 and "generate" in done.stdout and done.stderr == ""


@pytest.mark.slow
def test_what_needs_an_extra_says_which(alone: Run) -> None:
    plot = "from visar.viz import heat_map; heat_map([0])"
    tried = alone(
        "python",
        "-c",
        f"import sys; from visar.errors import VisarError\ntry: {plot}\n"
        "except VisarError as error: sys.exit(f'visar: error: {error}')",
    )
    told = [(tried.stderr, "demo")]
    for command, extra in (("demo", "demo"), ("serve", "serve")):
        done = alone("visar", command)
        assert done.returncode == 2
        told.append((done.stderr, extra))
    for said, extra in told:
        assert f"visar[{extra}]" in said and said.startswith("visar: error: ") and said.count("\n") == 1
