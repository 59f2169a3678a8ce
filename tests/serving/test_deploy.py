"""The files of examples/deploy: what they name is there, and Ray takes the configuration."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from visar.cli.parsers import parser

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "examples" / "deploy"


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def test_the_image_starts_a_command_that_is_there() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (\S+) ", text, re.M)
    assert copied == ["constraints.txt", "."] and (ROOT / "constraints.txt").exists()
    extras = re.search(r'"\.\[(.*)\]"', text)
    assert extras and all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras[1].split(","))
    command = re.search(r"^CMD \[(.*)\]", text, re.M)
    assert command and parser().parse_args(shlex.split(command[1].replace(",", ""))).host == "0.0.0.0"


def test_compose_runs_a_command_that_is_there() -> None:
    service = read("compose.yaml")["services"]["visar"]
    options = parser().parse_args(service["command"])
    assert options.rows == 8 and options.models == ["icons"]
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).samefile(DEPLOY / "Dockerfile")


def test_the_cluster_serves_what_visar_builds() -> None:
    spec = read("rayservice.yaml")["spec"]
    (found,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    assert found["import_path"] == "visar.cli.serve_on_ray:app"
    options = parser().parse_args(["serve", "--ray", *(f"--{k}={v}" for k, v in found["args"].items())])
    assert options.replicas == (1, 4)
    schema = pytest.importorskip("ray.serve.schema")
    schema.ServeDeploySchema(**yaml.safe_load(spec["serveConfigV2"]))
