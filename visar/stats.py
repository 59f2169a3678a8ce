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
    `draft_seconds`: the part of them that the passes of a drafter took, None where CUDA graphs hide it; `ms_per_pass`:
    milliseconds, drafting included; `gigabytes`: weights and cache read, by count and not by measurement;
    `graph_passes`: those that a CUDA graph took, and `capture_seconds`: the part of `seconds` that went into making it,
    once for all calls of a shape.
    """

    sampler: str
    parameters: dict[str, Any]
    exact: bool
    law: str
    seed: int
    settings: dict[str, Any]  # guidance, temperature, top-k, top-p, dtype, weights, device
    images: int
    tokens: int
    nfe: int
    passes_per_image: list[int]
    commits_per_pass: float
    seconds: float
    draft_seconds: float | None
    ms_per_pass: float
    gigabytes: float
    graph_passes: int
    capture_seconds: float

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


@dataclass(frozen=True)
class MaskedStats(DecodeStats):
    """Figures of a masked model, whose passes each run the diffusion head many times, one after the other.

    `head_steps` is T, the steps that are left of those asked for. `head_rounds`: evaluations of the target's head that
    had to wait for one another, over all passes, and `rounds_per_pass` their mean: T in plain decoding.
    `evaluations_per_token`: rows of those evaluations for each token drawn, T in plain decoding. `tested` and
    `accepted` count drafts, up to and with the first that is rejected.
    """

    head_steps: int
    head_rounds: int
    rounds_per_pass: float
    evaluations_per_token: float
    tested: int
    accepted: int

    @property
    def acceptance(self) -> float | None:
        """The share of tested drafts that were accepted; None where nothing is drafted."""
        return self.accepted / self.tested if self.tested else None

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"acceptance": self.acceptance}

    def __str__(self) -> str:
        drafts = "" if self.acceptance is None else f", {100 * self.acceptance:.0f}% of drafts accepted"
        return (
            f"{super().__str__()}, {self.rounds_per_pass:.1f} head rounds/pass, "
            f"{self.evaluations_per_token:.0f} head evaluations/token{drafts}"
        )
