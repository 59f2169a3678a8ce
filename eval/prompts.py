"""The fixed prompts, or classes, that models are measured with."""

from __future__ import annotations

from typing import Any

from visar.generation.model import ImageModel

# Common things in the three styles of the embedded model; the first `images` of them are decoded.
THINGS = (
    "red heart", "lion", "green apple", "dog face", "pizza", "cat", "grinning face", "elephant", "banana", "panda",
    "tiger face", "fish", "rose", "carrot", "hamburger", "birthday cake", "penguin", "cherries", "crying face", "bee",
    "frog", "blue heart",
)  # fmt: skip
PROMPTS = tuple(f"{thing}, {style}" for thing in THINGS for style in ("3d", "noto", "flat"))[:64]


def conditions(model: Any, count: int) -> list[Any]:
    """The prompts or classes that are measured with."""
    family = ImageModel.of(model).family
    if family.condition == "prompt":
        return [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    return [i * 37 % family.classes for i in range(count)]
