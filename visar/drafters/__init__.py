"""Drafters: models that propose draft tokens for a target. Each kind is one file, and registers itself."""

from __future__ import annotations

from visar.drafters import small_model
from visar.drafters.base import DRAFTERS, DraftKind, drafter_kind, drafter_kinds, fingerprint, register_drafter
from visar.drafters.eagle import EagleHead
from visar.drafters.exit import ExitHead
from visar.drafters.heads import DraftHeads
from visar.drafters.skip import SkippedLayers

__all__ = [
    "DRAFTERS",
    "DraftHeads",
    "DraftKind",
    "EagleHead",
    "ExitHead",
    "SkippedLayers",
    "drafter_kind",
    "drafter_kinds",
    "fingerprint",
    "register_drafter",
    "small_model",
]
