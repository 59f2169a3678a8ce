"""Draft models of every kind, and the mark that tells whose drafter one is."""

from __future__ import annotations

import hashlib

import torch

from visar.drafters.eagle import EagleHead
from visar.drafters.heads import DraftHeads
from visar.drafters.shallow import ExitHead, SkippedLayers
from visar.families.llamagen.gpt import LlamaGen

DraftModel = LlamaGen | EagleHead | DraftHeads | ExitHead | SkippedLayers
DRAFTERS = {cls.__name__: cls for cls in (LlamaGen, EagleHead, DraftHeads, ExitHead, SkippedLayers)}
KINDS = ("model", "eagle", "medusa", "hydra", "exit", "skip")  # "model": a smaller one of the target's own kind


def fingerprint(target: LlamaGen) -> str:
    """A mark of a target's weights that is the same in every dtype: a hash of the signs of its output head."""
    signs = torch.signbit(target.output.weight.detach()).cpu().numpy()
    return hashlib.sha256(signs.tobytes()).hexdigest()[:16]
