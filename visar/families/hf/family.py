"""The families whose models are transformers' own, each in a module of its own."""

from visar.families.hf import chameleon, emu3, emu3_5, glm_image, janus

__all__ = ["chameleon", "emu3", "emu3_5", "glm_image", "janus"]
