"""The families whose models are transformers' own, each in a module of its own."""

from visar.families.hf import glm_image, janus

__all__ = ["glm_image", "janus"]
