"""What starts the command line imports no package that is slow to import and that it does not use."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The arrows of docs/architecture.md: a part imports only from those after it.
ARROWS = (
    ("cli", "demo"), ("serving",), ("eval.report",), ("eval.benchmark", "eval.quality", "bulk"),
    ("eval.exactness",), ("generation",), ("drafters",), ("families", "samplers"), ("engine",), ("kernels",),
)  # fmt: skip
RELAXED = "visar.eval.exactness.relaxed"  # a script that draws a plot of the report
HEAVY = ("diffusers", "transformers", "torch._dynamo", "torch._inductor")
PACKAGES = ("drafters", "engine", "families", "generation", "kernels", "samplers", "text_encoders")
IMPORTS = f"""
import importlib, pkgutil
for name in {PACKAGES}:
    package = importlib.import_module("visar." + name)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
"""
DECODES = """
from visar.generation.model import ImageModel
from visar.samplers import MaskedAutoregressive
for name, sampler in (("icons", "scd"), ("icons-mar", MaskedAutoregressive(steps=2, head_steps=5))):
    model = ImageModel.load(name)
    assert model.generate(["a red heart"], sampler=sampler, seed=1).images
"""


def test_nothing_heavy_is_imported() -> None:
    code = f"{IMPORTS}{DECODES}\nimport sys\nprint([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def part_of(module: str) -> str:
    names = module.split(".")[1:]
    return ".".join(names[: 2 if names[:1] == ["eval"] else 1])


def imported(folder: str) -> Iterator[tuple[str, str]]:
    """A module and each module of the package that it imports, within functions and for type checkers too."""
    for file in sorted((ROOT / "visar" / folder.replace(".", "/")).rglob("*.py")):
        own = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(file.read_text())):
            found = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            found += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            yield from ((own, name) for name in found if name.startswith("visar."))


@pytest.mark.parametrize("part", [part for level in ARROWS for part in level])
def test_imports_go_one_way(part: str) -> None:
    level = {name: i for i, names in enumerate(ARROWS) for name in names}
    seen = list(imported(part))
    assert seen or part == "kernels"
    for own, name in seen:
        to = part_of(name)
        allowed = {part, *(("demo",) if part == "cli" else ("eval.report",) if own == RELAXED else ())}
        assert to in allowed or level.get(to, 99) > level[part], f"{own} imports {name}"
        assert to != "pipelines" or part == "demo", f"{own} imports {name}"
