"""Every code block of the README, of docs/ and of the model cards runs, and every link of theirs leads somewhere.

`sh` blocks: each command goes through the command line's own `main` in a folder of the page, where small files of the
published layouts lie (`stand_ins.py`). `python` blocks of a page are executed in order, in one namespace; one that
begins with its own name, in a comment or a docstring, is a file of the folder, too. `text` is output or a formula, and
`toml` a part of a project's file; neither is run.
"""

from __future__ import annotations

import argparse
import io
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import stand_ins
from visar.cli import main, parser

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Pages of the site that do not lie in docs/.
BESIDE = [*sorted(ROOT.glob("assets/*/README.md")), ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md")), *BESIDE]
FENCE = re.compile(r"^ *(?P<ticks>`{3,}|~{3,})(?P<language>[^\n]*)\n(?P<code>.*?)^ *(?P=ticks) *$", re.S | re.M)

# Long runs are made short, before a block is run.
SHORTER = {
    r"-n (2048|2212)\b": "-n 4",
    r"-n 50000\b": "-n 2",
    r"count=2048\b": "count=4",
    r"--repeats \d+": "--repeats 1",
    r"\bbatch([= ])(32|64)\b": r"batch\g<1>4",
    r",specdec\+\+,spectr,[\w+,\-\\\s]+,zipar": ",eagle,zipar",
    r'\.to\("cuda"': '.to("cpu"',
    r"\bsteps=64, head_steps=100\b": "steps=8, head_steps=10",
    r"\bgoogle/flan-t5-xl\b": "flan-t5-xl",
    r"\bdeepseek-community/Janus-Pro-1B\b": "./Janus-Pro-1B",
    r"\bEmu3-community/Emu3-Gen-hf\b": "./Emu3-Gen-hf",
    r"--image-size 720\b": "--image-size 32",
    r"\bheight=544, width=960\b": "height=16, width=32",
    r"window=(32|64)\b": "window=8",
    r"\bzai-org/GLM-Image\b": "./GLM-Image",
    r"--model \./Lumina-mGPT-7B-768\b": "--model ./Lumina-mGPT-7B-768 --image-size 64x64",
    r"--image-size 1024x768\b": "--image-size 96x64",
    r"\bheight=768, width=1024\b": "height=64, width=96",
}
# Options that end a command soon, put behind those that it has.
SOONER = {
    "visar generate --class 207 --model checkpoint": "--set steps=8 --set head_steps=10",
    "visar bench": "-n 1 --repeats 1",
    "visar eval report": "-n 4 --speed-images 1",
    "visar train tokenizer": "--minutes 0.005 --batch 2 --no-compile",
    "visar train autoencoder": "--minutes 0.005 --batch 2 --no-compile",
    "visar train ar": "--minutes 0.005 --batch 2 --no-compile",
    "visar train two-way": "--minutes 0.005 --batch 2 --no-compile",
    "visar train jacobi": "-n 4 --batch 2 --steps 2 --no-compile",
    "visar train mar": "--minutes 0.005 --batch 2 --no-compile",
    "visar train clip": "--minutes 0.005 --batch 2",
    "visar train drafter": "-n 4 --batch 2 --steps 2 --no-compile",
    "python -m visar.eval.benchmark.calibrate": "--images 1 --depth 2 --nodes 4",
    "python -m visar.eval.quality.cross_entropy": "--images 2",
    "python -m visar.eval.benchmark.gpu_check": "--dry-run",
}
# What begins so is only parsed, by the real parser where it is a command of visar.
PARSED = {
    "torchrun ": "several processes and GPUs; tests/bulk/test_kill.py runs two",
    "visar sample --prompts prompts.txt --model ./Lumina-mGPT": "settings of papers, of hours",
    "visar sample --prompts prompts.txt --model ./Anole": "as above",
    "visar demo": "a server that ends when it is stopped",
    "visar serve": "as above",
    "visar bench --serve": "a load test of minutes; tests/serving/test_load.py runs a small one",
    "visar bench --shapes": "models of published size; tests/eval/benchmark/test_shapes.py runs small ones",
    "visar train images": "downloads the packages of ten image sets",
    "visar train words": "needs the extra `train`",
    "visar train tokenizer --data images --out run/vq --size 128": "as the next two, from weights of a checkout; "
    "tests/training/test_patches.py and test_variant_training.py run small ones",
    "visar train ar --data images --out run/ar --size 128": "see above",
    "visar train assemble --gpt run/ar/gpt --tokenizer run/vq/vq --words run/ar/text_encoder": "see above",
    "visar train two-way --init icons": "an hour; tests/training/test_two_way_training.py runs small ones",
    "visar eval stats": "downloads the weights of Inception",
    "visar eval fid": "needs 2,048 images, and weights as above",
    "visar eval clip images": "downloads the weights of a CLIP",
}
# No commands of visar, and not run: each as it stands.
FOREIGN = {
    "bash examples/train_icons.sh images run": "minutes of a GPU; its commands are those of the trainers",
    "python -m visar.eval.report.prompt_sheet --model my-model --out sheet.png": (
        "100 images of the model above; tests/eval/report/test_prompt_sheet.py makes few"
    ),
    "python -m visar.eval.quality.two_way --model icons-two-way --data images --without-groups symbols": (
        "minutes; tests/eval/quality/test_two_way.py measures small ones"
    ),
    'pip install "PATH_OF_THE_CLONE[demo]" --constraint PATH_OF_THE_CLONE/constraints.txt': (
        "installs; tests/project/test_wheel.py does so with the same constraints"
    ),
    "uv run pytest": "these tests themselves",
    "pytest -m gpu": "these tests themselves",
}
SLOW = ("visar train", "visar eval compare", "visar eval report", "visar eval clip run", "visar.eval.", "visar bench",
        "visar verify")  # fmt: skip
NOT_RUN = ("text", "toml")
# Pages whose output is computed alike on every machine: a Python block prints the `text` block behind it.
SHOWN = ("exactness.md", "own-sampler.md")


@dataclass
class Block:
    page: Path
    number: int
    language: str
    code: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.number}"

    @property
    def slow(self) -> bool:
        return self.language == "sh" and any(
            long in command for command in commands(self.code) for long in SLOW if not command.startswith(tuple(PARSED))
        )


@dataclass
class Workplace:
    """A folder in which the blocks of a page run, the namespace of its Python, and which have run."""

    folder: Path
    namespace: dict[str, Any] = field(default_factory=lambda: {"__name__": "page"})
    done: set[int] = field(default_factory=set)


def blocks(page: Path) -> list[Block]:
    found = enumerate(FENCE.finditer(page.read_text()), start=1)
    return [Block(page, i, match["language"], match["code"]) for i, match in found]


BLOCKS = [block for page in PAGES for block in blocks(page)]


def marked(block: Block) -> Any:
    return pytest.param(block, id=block.name, marks=[pytest.mark.slow] if block.slow else [])


def commands(code: str) -> list[str]:
    lines = code.replace("\\\n", "").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def shortened(text: str) -> str:
    for pattern, short in SHORTER.items():
        text = re.sub(pattern, short, text)
    return text


def run(command: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """One line of a shell block: `visar ...` or `python -m visar...`, also behind `uv run`."""
    if command in FOREIGN:
        return
    command = shortened(command.removeprefix("uv run "))
    words = shlex.split(command, comments=True)
    if any(command.startswith(start) for start in PARSED):
        parser().parse_args(words[words.index("visar") + 1 :])
        return
    words += shlex.split(" ".join(more for start, more in SOONER.items() if command.startswith(start)))
    if words[:2] == ["python", "-m"]:
        patch.setattr(sys, "argv", words[2:])
        with pytest.raises(SystemExit) as end:
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        assert not end.value.code, command
    else:
        assert words[0] == "visar", f"neither run nor excepted: {command}"
        assert main(words[1:]) == 0, command
    for flag, path in pairwise(words):
        if flag in ("-o", "--out", "--npz"):
            assert (folder / path).exists(), f"{command} made no {path}"


def execute(block: Block, place: Workplace, patch: pytest.MonkeyPatch) -> None:
    place.done.add(block.number)
    code = shortened(block.code) if block.language == "python" else block.code
    if block.language == "sh":
        for command in commands(code):
            run(command, place.folder, patch)
    elif block.language == "python":
        if named := re.match(r'(?:# |""")(\w+\.py)\b', code):
            (place.folder / named[1]).write_text(code)
        with redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, block.name, "exec", dont_inherit=True), place.namespace)
        following = blocks(block.page)[block.number : block.number + 1]
        if block.page.name in SHOWN and following and following[0].language == "text":
            assert printed.getvalue() == following[0].code
        for path in re.findall(r'\.save\("([^"{]+)"\)', code):
            assert (place.folder / path).exists()


@pytest.fixture(autouse=True)
def table_of_samplers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page may register a sampler; other tests are not to see it."""
    from visar.samplers import registry

    len(registry.SAMPLERS)  # all of ours are there
    monkeypatch.setattr(registry, "_SPECS", dict(registry._SPECS))
    monkeypatch.setattr(registry, "_MAKERS", dict(registry._MAKERS))


@pytest.fixture(scope="module")
def workplaces(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Workplace]:
    @cache
    def of(page: Path) -> Workplace:
        place = Workplace(tmp_path_factory.mktemp(page.stem))
        stand_ins.lay_down(place.folder)
        if page.parent.name == "families":
            stand_ins.lay_down_family(place.folder, page.stem)
        return place

    return of


@pytest.mark.parametrize("block", [marked(block) for block in BLOCKS if block.language not in NOT_RUN])
def test_block(block: Block, workplaces: Callable[[Path], Workplace], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the blocks before it, if they have not run yet; slow ones go only before slow ones."""
    place = workplaces(block.page)
    monkeypatch.chdir(place.folder)
    stand_ins.two_heads(monkeypatch)
    if block.page.stem == "glm-image":
        stand_ins.small_glm(monkeypatch)
    for earlier in blocks(block.page)[: block.number - 1]:
        if earlier.number not in place.done and (block.slow or not earlier.slow):
            execute(earlier, place, monkeypatch)
    execute(block, place, monkeypatch)


def test_nothing_escapes() -> None:
    """Every fence has a language that is dealt with, none is left open, and no code is set by indentation."""
    for page in PAGES:
        for block in blocks(page):
            known = block.language in ("sh", "python", *NOT_RUN)
            assert known, f"{block.name}: a block of {block.language or 'nothing'}"
        rest = FENCE.sub("", page.read_text())
        assert "```" not in rest and "~~~" not in rest, f"{page.name} has a fence that does not end"
        if DOCS / "api" not in page.parents:
            assert not re.search(r"\n\n(    |\t)", rest), f"{page.name} has indented code"


def test_exceptions_are_used() -> None:
    lines = [command.removeprefix("uv run ") for b in BLOCKS if b.language == "sh" for command in commands(b.code)]
    for start in (*PARSED, *SOONER):
        assert any(line.startswith(start) for line in lines), f"no page has {start!r}"
    text = "\n".join(block.code for block in BLOCKS)
    assert all(re.search(pattern, text) for pattern in SHORTER) and all(line in text for line in FOREIGN)


def options_of(words: list[str]) -> set[str] | None:
    """The options of the command that the words begin with; None if there is no such command."""
    at: argparse.ArgumentParser = parser()
    for word in words:
        choices = next((a.choices for a in at._actions if isinstance(a, argparse._SubParsersAction)), None)
        if choices is None:
            break
        if word not in choices:
            return None
        at = choices[word]
    return {option for action in at._actions for option in action.option_strings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_within_sentences(page: Path) -> None:
    """They are often cut short, so they are not run; but their names and options exist."""
    for text in re.findall(r"`((?:visar|python -m visar) [a-z][^`]*)`", FENCE.sub("", page.read_text())):
        words = text.removeprefix("python -m ").split()[1:]
        known = options_of(words)
        assert known is not None, f"{page.name}: {text}"
        given = {word.partition("=")[0] for word in words if word.startswith("--") and len(word) > 2}
        assert given <= known, f"{page.name}: {text} has {given - known}"


def slugs(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), flags=re.M)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT) and file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in slugs(file), f"{page.name} links to {target}"


def test_every_page_is_in_the_navigation() -> None:
    groups = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    entries = [entry for group in groups for part in group.values() for entry in part]
    paths = {next(iter(entry.values())) if isinstance(entry, dict) else entry for entry in entries}
    inside = {str(page.relative_to(DOCS)) for page in PAGES if DOCS in page.parents}
    assert inside | {str(page.relative_to(ROOT)) for page in BESIDE} == paths


def test_the_tables_name_every_sampler_and_model() -> None:
    from visar.families.catalogue import catalogue
    from visar.samplers.catalogue import catalogue as samplers

    readme, table = (ROOT / "README.md").read_text(), (DOCS / "samplers.md").read_text()
    for name in samplers():
        assert f"| `{name}`" in table, name
    for name in re.findall(r"^\| `([\w+-]+)`.* \|$", readme, re.M):
        assert name in samplers() or name in catalogue(), name
    assert f"There are {len(samplers())} samplers" in readme
    for listing in catalogue().values():
        assert f"`{listing.name}`" in readme or listing.needs


def test_tokens_per_pass_are_tokens_over_passes() -> None:
    """In every table that has both: 256 tokens over the passes without the caption's, up to rounding."""
    checked = 0
    for page in PAGES:
        names: list[str] = []
        for line in page.read_text().splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
            if not cells or "tokens per pass" in cells:
                names = cells
            elif (nfe := next((i for i, name in enumerate(names) if name.startswith("NFE")), None)) is not None:
                if cells[0].startswith("-"):
                    continue
                least, most = (256 / (float(cells[nfe]) - 1 + off) for off in (0.05, -0.05))
                assert least - 0.005 <= float(cells[names.index("tokens per pass")]) <= most + 0.005, line
                checked += 1
    assert checked > 20
