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
LOADS = """
from pathlib import Path
from visar import assets
from visar.drafters.loading import load_drafter
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.vq import VQModel
from visar.families.mar.autoencoder import KLAutoencoder
from visar.families.mar.transformer import MAR
from visar.text_encoders.words import WordEncoder
home = Path(assets.__file__).parent
gpt = LlamaGen.from_pretrained(home / "icons" / "gpt")
for kind in ("eagle", "exit", "hydra", "medusa", "model", "skip"):
    load_drafter(home / "icons" / kind, gpt, gpt.config.grid)
VQModel.from_pretrained(home / "icons" / "vq")
WordEncoder.from_pretrained(home / "icons" / "text_encoder")
KLAutoencoder.from_pretrained(home / "icons-mar" / "vae")
MAR.from_pretrained(home / "icons-mar" / "mar")
"""
DECODES = """
import torch
from visar.engine.guidance import Guidance
from visar.engine.loop import decode
from visar.engine.rng import Noise
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.session import ModelSession
from visar.samplers import Target, get_sampler
gpt = LlamaGen(vocab_size=24, dim=32, num_layers=2, num_heads=2, ffn=48, grid=3, classes=7).eval()
sampler = get_sampler("scd", window=3)
with torch.inference_mode():
    session = ModelSession(gpt, torch.tensor([1]), length=9, window=3, guidance=Guidance(2.0))
    assert decode(session, sampler, Target(top_k=5), Noise(0, torch.zeros(1, dtype=torch.long))).passes
"""


@pytest.mark.parametrize("code", [IMPORTS, LOADS, DECODES], ids=["imports", "loads", "decodes"])
def test_nothing_heavy_is_imported(code: str) -> None:
    code += f"\nimport sys\nprint([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
