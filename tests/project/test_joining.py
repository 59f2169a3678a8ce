"""What newcomers read and what runs for them names files, versions and commands that exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from visar import __version__

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOP = {path.name for path in ROOT.iterdir()}


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def named_paths(text: str) -> set[str]:
    """Paths of the repository in code spans and links: those that begin with one of its files or folders."""
    words = re.findall(r"`([\w./-]+)`", text) + re.findall(r"\]\(([\w./-]+)\)", text)
    return {word for word in words if "/" in word or word in TOP or re.fullmatch(r"\w+\.(md|py|toml|cff|yml)", word)}


def test_paths_that_are_named_exist() -> None:
    paths = named_paths((ROOT / "CONTRIBUTING.md").read_text())
    assert len(paths) > 25 and not [path for path in paths if not (ROOT / path).exists()]


def test_workflows_run_what_there_is() -> None:
    steps = [s for w in WORKFLOWS for job in read(w)["jobs"].values() for s in job["steps"] if "run" in s]
    lines = [step["run"] for step in steps]
    assert ".ci/checks" in lines and (ROOT / ".ci/checks").stat().st_mode & 0o100
    groups, extras = PROJECT["dependency-groups"], PROJECT["project"]["optional-dependencies"]
    for line in lines:
        assert set(re.findall(r"--group (\w+)", line)) <= set(groups)
        assert {e for found in re.findall(r"\.\[([\w,]+)\]", line) for e in found.split(",")} <= set(extras)
    assert 'uv run --no-sync pytest -m "slow and not gpu"' in lines


def test_tests_run_on_every_python_that_is_promised() -> None:
    tested = set(read(ROOT / ".github/workflows/ci.yml")["jobs"]["tests"]["strategy"]["matrix"]["python"])
    promised = {match[1] for c in PROJECT["project"]["classifiers"] if (match := re.search(r":: (3\.\d+)$", c))}
    assert tested == promised and PROJECT["project"]["requires-python"] == ">=" + min(tested, key=lambda v: int(v[2:]))


def test_templates_are_forms() -> None:
    forms = [path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert len(forms) == 3
    for form in map(read, forms):
        assert {"name", "description", "body"} <= set(form)
        ids = [part["id"] for part in form["body"]]
        assert len(ids) == len(set(ids)) and all(part["attributes"]["label"] for part in form["body"])


def test_the_citation_is_of_this_version() -> None:
    citation = read(ROOT / "CITATION.cff")
    released = re.findall(r"^## \[(.+?)\] - (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert (citation["version"], str(citation["date-released"])) == released[0] and citation["version"] == __version__
    assert citation["license"] == PROJECT["project"]["license"]


def test_hooks_before_a_commit_parse() -> None:
    hooks = [hook["id"] for repo in read(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert {"ruff-check", "ruff-format"} <= set(hooks)


def test_scripts_of_ci_parse() -> None:
    for name in ("run", "checks"):
        assert subprocess.run(["bash", "-n", str(ROOT / ".ci" / name)]).returncode == 0
