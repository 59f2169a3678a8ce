"""What a decoding says about itself: always the number of passes and the time of a pass, apart."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class DecodeStats:
    """Figures of one batch.

    `nfe`: passes of the target model over the batch, the prefill of a caption included; `passes_per_image`: decoding
    passes after which each image was complete; `commits_per_pass`: tokens of an image over its passes, mean over the
    batch; `seconds`: decoding without prefill, text encoder and picture decoder, the device waited for;
    `draft_seconds`: the part of them that the passes of a drafter took; `ms_per_pass`: milliseconds, drafting included;
    `gigabytes`: weights and cache read, by count and not by measurement.
    """

    sampler: str
    parameters: dict[str, Any]
    exact: bool
    law: str
    seed: int
    settings: dict[str, Any]  # guidance, temperature, top-k, top-p, dtype, device
    images: int
    tokens: int
    nfe: int
    passes_per_image: list[int]
    commits_per_pass: float
    seconds: float
    draft_seconds: float
    ms_per_pass: float
    gigabytes: float

    @property
    def gb_per_second(self) -> float:
        """Bytes that had to be read over the time it took, in 10**9 per second."""
        return self.gigabytes / self.seconds

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"gb_per_second": self.gb_per_second}

    def __str__(self) -> str:
        kind = self.law if not self.exact else "exact"
        return (
            f"{self.sampler} ({kind}): {self.nfe} NFE for {self.tokens} tokens x {self.images} images, "
            f"{self.commits_per_pass:.2f} tokens/pass, {self.ms_per_pass:.2f} ms/pass, {self.seconds:.2f} s"
        )
