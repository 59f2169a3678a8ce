"""Draft models that read the features of the target model, and the mark that tells whose drafter one is."""

from __future__ import annotations

import hashlib

import torch

from visar.models.drafters.eagle import EagleHead
from visar.models.drafters.heads import DraftHeads
from visar.models.drafters.shallow import ExitHead, SkippedLayers
from visar.models.llamagen import LlamaGen

TrainedDrafter = EagleHead | DraftHeads | ExitHead | SkippedLayers
DRAFTERS = {cls.__name__: cls for cls in (EagleHead, DraftHeads, ExitHead, SkippedLayers)}
KINDS = ("eagle", "medusa", "hydra", "exit", "skip")


def fingerprint(target: LlamaGen) -> str:
    """A mark of a target's weights that is the same in every dtype: a hash of the signs of its output head."""
    signs = torch.signbit(target.output.weight.detach()).cpu().numpy()
    return hashlib.sha256(signs.tobytes()).hexdigest()[:16]
