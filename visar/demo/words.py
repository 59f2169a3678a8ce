"""What a first-time visitor reads of samplers: three groups, and one plain line for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from visar.samplers import spec_of

GROUPS = ("Exact, needs nothing", "Exact, with a drafter", "Relaxed: other images than those of plain decoding")
LINES: Mapping[str, str] = MappingProxyType({
    "ar": "Plain decoding: one token in each pass. The baseline.",
    "sjd": "Guesses a window of tokens and tests all of them in each pass.",
    "scd": "Guesses a window of tokens, as alike as can be from pass to pass, and tests all.",
    "scd-gumbel": "As scd, with shared Gumbel noise for the guesses.",
    "jacobi": "Takes the most likely token everywhere, so every seed gives one image.",
    "speculative": "A smaller model guesses a few tokens ahead.",
    "speculative-block": "A smaller model guesses; the guesses are tested as one block.",
    "specdec++": "A smaller model guesses until a mistake is likely.",
    "disco": "As specdec++, until the last guess is likely to be one.",
    "speculative-tree": "A smaller model guesses several continuations at once.",
    "spectr": "A smaller model guesses several continuations, each for itself.",
    "eagle": "A small network on the model's features guesses a tree of tokens.",
    "eagle-top": "As eagle, with the most likely tokens as guesses.",
    "eagle-chain": "As eagle, with one continuation in place of a tree.",
    "eagle2": "As eagle, with a tree that takes a new shape in every pass.",
    "rsd-s": "As eagle, with a tree whose branches all differ.",
    "ddd": "As eagle2, with a tree that ends where its tokens become unlikely.",
    "dyspec": "As rsd-s, with branches only where guesses were right before.",
    "medusa": "Extra heads guess the next tokens, each for itself.",
    "hydra": "Extra heads guess the next tokens, each from the guess before it.",
    "kangaroo": "The model's first layers guess, all of its layers test.",
    "swift": "The model guesses with some of its layers left out.",
    "gsd": "Accepts a guess if a similar token would do.",
    "diagonal": "Decodes a diagonal of the image in each pass, by a model that was trained for it.",
    "parallel": "Decodes a group of cells in each pass, by a model of any order.",
    "zipar": "Decodes several rows of the image at once.",
    "lantern": "Accepts a guess if codes that look alike are likely enough together.",
    "lantern++": "As lantern, within a bound for each guess.",
    "cool-sd": "Accepts the first guesses of each pass more often.",
    "bild": "A smaller model guesses, and its guesses are accepted more often.",
    "typical": "Accepts a guess if it is likely enough, without a proper test.",
    "blockwise": "Takes the most likely token, or a guess that looks like it.",
    "mar": "64 passes, each with the whole diffusion head.",
    "mar-256": "One token in each pass.",
    "mar-32-50": "Half the passes, and half the denoising steps.",
    "mar-headspec": "As mar, with guesses within the diffusion head.",
    "mar-disa": "Fewer and fewer denoising steps.",
    "mar-gtr": "A checkerboard first, and the rest of the image in one pass.",
    "cspd": "A smaller model guesses, as published.",
    "cspd-exact": "A smaller model guesses, made exact.",
})  # fmt: skip


def group_of(sampler: str) -> int:
    """The number of its group."""
    spec = spec_of(sampler)
    return 2 if not spec.exact else 1 if spec.drafter else 0


def ordered(samplers: Iterable[str]) -> list[str]:
    """Samplers group by group; in a group as in `LINES`, then those of the user's own."""
    names = list(LINES)
    return sorted(samplers, key=lambda name: (group_of(name), names.index(name) if name in LINES else len(names)))


def line_of(sampler: str) -> str:
    """Its line; for one of the user's own what it was registered with."""
    return LINES.get(sampler) or spec_of(sampler).paper


def short_kind(sampler: str) -> str:
    """Whether it is exact, in a few words."""
    spec = spec_of(sampler)
    known = {"relaxed": "Relaxed.", "exact": "Exact."}
    return known.get(spec.exactness, "Of another model." if spec.exact else "Not exact.")


class Speeds:
    """What samplers took on this machine: the means over the images made since the server started."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], tuple[int, float, float]] = {}

    def add(self, model: str, sampler: str, nfe: int, seconds: float) -> None:
        images, passes, time = self._found.get((model, sampler), (0, 0.0, 0.0))
        self._found[model, sampler] = images + 1, passes + nfe, time + seconds

    def told(self, model: str, sampler: str) -> str:
        """Passes and seconds of an image in words; "" where none was made."""
        images, passes, time = self._found.get((model, sampler), (0, 0.0, 0.0))
        return f"{passes / images:.0f} passes, {time / images:.2f} s" if images else ""
