"""The families whose models are transformers' own, each in a module of its own."""

from visar.families.hf import janus

__all__ = ["janus"]
