"""Prompts as people type them, for training: the plain noun, a synonym, a keyword, with the style or without."""

from __future__ import annotations

import random
import re

from visar.training.data import Record

# A prompt without a style stands for this one in half of its images, and seldom for any other.
DEFAULT_STYLE = "3d"
LEFT_OUT = (0.5, 0.05)  # of the default style, of others


def head(caption: str, group: str = "") -> str:
    """What a caption is first of all about: "house with garden" is a house, the "cat face" of an animal a cat."""
    plain = re.split(r"[:,(]| with | behind | wearing | on | showing ", caption)[0].strip()
    if group == "animals & nature":
        plain = plain.removesuffix(" face")
    return plain or caption


def plural(noun: str) -> str:
    """The regular plural of a noun's last word."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def typed(record: Record, rng: random.Random) -> str:
    """A prompt for the record's image, varied as users vary it."""
    words, chance = record.caption, rng.random()
    if chance < 0.2:
        words = head(words, record.group)
    elif chance < 0.3 and record.tags:
        words = f"{words} {rng.choice(record.tags)}"
    elif chance < 0.45 and record.tags:
        words = " ".join(rng.sample(record.tags, min(len(record.tags), rng.choice((1, 1, 2)))))
    elif chance < 0.5:
        words = plural(words)
    without = rng.random() < LEFT_OUT[record.style != DEFAULT_STYLE]
    return words if without or not record.style else f"{words}, {record.style}"
