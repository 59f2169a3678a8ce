"""The result of a measurement: metrics, each with everything that it depends on.

A metric is never printed alone: protocol and version, network and hash of its weights, reference, count, resizing, file
format, library versions and seed are on the same line.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """`values` by the protocol's names. `spread` (low, high): a CLIP score's 95% interval; for KID, one standard
    deviation between subsets either way. `left_out`: metrics that were not measured, and why. Hashes are sha256 in hex.
    """

    protocol: str
    values: dict[str, float]
    spread: dict[str, tuple[float, float]]
    left_out: dict[str, str]
    n: int
    extractor: str
    weights: str
    resize: str
    prepare: str
    pixels: tuple[int, int]  # height, width
    format: str
    images: str
    reference: dict[str, str]  # of its moments, its images, or both; empty where there is none
    versions: dict[str, str]
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """`names[protocol@version facts] = values`, one line; hashes are cut to 12 digits."""
        of = " ".join(f"ref-{name}=sha256:{value[:12]}" for name, value in self.reference.items())
        facts = [
            self.protocol, f"n={self.n}", f"{self.extractor}=sha256:{self.weights[:12]}", *([of] if of else []),
            f"prepare={self.prepare}", f'resize="{self.resize}"', f"{self.pixels[1]}x{self.pixels[0]}", self.format,
            *(f"{name}={version}" for name, version in self.versions.items()), f"seed={self.seed}",
        ]  # fmt: skip
        values = (f"{value:.6g}" + self._between(name) for name, value in self.values.items())
        return f"{','.join(self.values)}[{' '.join(facts)}] = {', '.join(values)}"

    def _between(self, name: str) -> str:
        if name not in self.spread:
            return ""
        low, high = self.spread[name]
        return f" ({low:.6g} to {high:.6g})"
