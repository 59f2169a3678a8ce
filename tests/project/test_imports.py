"""What starts the command line imports no package that is slow to import and that it does not use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("code", [IMPORTS, DECODES], ids=["imports", "decodes"])
def test_nothing_heavy_is_imported(code: str) -> None:
    code += f"\nimport sys\nprint([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
