"""Metrics of a decoding; the number of passes and the time of a pass are always separate."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from typing import Any, cast

from typing_extensions import Self

from visar.engine.loop import Decoded
from visar.params import SamplingParams
from visar.samplers import SAMPLERS, values_of


@dataclass(frozen=True, repr=False)
class DecodeStats:
    """Metrics of one batch.

    `window`: tokens of an image that a pass takes at most, on which the distribution depends in 16 bits;
    `exactness`: "exact", "relaxed", or a phrase if it is neither; `nfe`: passes of the target model over the batch, the
    prefill of a caption included; `passes_per_image`: decoding passes until each image was complete; `tokens_per_pass`:
    tokens of an image over the passes of the batch, which ends with its slowest image; `seconds`: of decoding, without
    prefill, text encoder and image decoder, with the device synchronized; `draft_seconds`: the part of them in the
    drafter's passes, and `draft_passes`: their number, None if CUDA graphs hide them; `ms_per_pass`: milliseconds,
    drafting included; `gigabytes`: weights and cache read, counted and not measured; `graph_passes`: those run by a
    CUDA graph; `capture_seconds`: the part of `seconds` that made the graph, once for all calls of a shape.
    """

    sampler: str
    parameters: dict[str, Any]
    window: int
    exact: bool
    exactness: str
    seed: int | list[int]  # or one for each image
    settings: dict[str, Any]  # guidance, temperature, top-k, top-p, dtype, weights, invariant, device
    images: int
    tokens: int
    nfe: int
    passes_per_image: list[int]
    tokens_per_pass: float
    seconds: float
    draft_seconds: float | None
    draft_passes: int | None
    ms_per_pass: float
    gigabytes: float
    graph_passes: int
    capture_seconds: float

    @classmethod
    def of(
        cls,
        method: Any,
        params: SamplingParams,
        settings: dict[str, Any],
        session: Any,
        result: Decoded,
        *,
        nfe: int,
        draft_seconds: float | None,
        draft_passes: int | None,
        gigabytes: float,
        sampled: int | None = None,
        **more: Any,
    ) -> Self:
        """The stats of a finished decoding; `sampled` is the number of tokens of an image that were not given."""
        tokens = session.length if sampled is None else sampled
        return cls(
            sampler=method.name,
            parameters=values_of(method),
            window=min(method.window, session.length),
            exact=method.exact,
            exactness=exactness_of(method),
            seed=params.to_dict()["seed"],
            settings=settings,
            images=session.batch,
            tokens=session.length,
            nfe=nfe,
            passes_per_image=(result.commit_pass.amax(1) + 1).tolist(),
            tokens_per_pass=tokens / result.passes,
            seconds=result.seconds,
            draft_seconds=draft_seconds,
            draft_passes=draft_passes,
            ms_per_pass=1000 * result.seconds / result.passes,
            gigabytes=gigabytes,
            graph_passes=result.replays,
            capture_seconds=result.capture_seconds,
            **more,
        )

    def joined(self, others: Sequence[DecodeStats]) -> Self:
        """The stats of several consecutive decodings with one sampler; the seed is that of the first."""
        every: list[DecodeStats] = [self, *others]
        passes = sum(max(s.passes_per_image) for s in every)
        seconds = sum(s.seconds for s in every)
        drafting, drafts = [s.draft_seconds for s in every], [s.draft_passes for s in every]
        return replace(
            self, images=sum(s.images for s in every), nfe=sum(s.nfe for s in every),
            passes_per_image=[n for s in every for n in s.passes_per_image],
            tokens_per_pass=tokens_per_pass(every),
            seconds=seconds, draft_seconds=None if None in drafting else sum(filter(None, drafting)),
            draft_passes=None if None in drafts else sum(filter(None, drafts)),
            ms_per_pass=1000 * seconds / passes, gigabytes=sum(s.gigabytes for s in every),
            graph_passes=sum(s.graph_passes for s in every), capture_seconds=sum(s.capture_seconds for s in every),
        )  # fmt: skip

    @property
    def gb_per_second(self) -> float:
        """`gigabytes` per second of decoding."""
        return self.gigabytes / self.seconds

    @property
    def distribution(self) -> str:
        """Which distribution the target is: in 16 bits it depends on the passes, but for the invariant mode."""
        dtype = str(self.settings.get("dtype", "float32"))
        if self.settings.get("invariant"):
            return f"the model's in {dtype}, by passes of any width"
        if dtype == "float32" or "invariant" not in self.settings:
            return f"the model's in {dtype}"
        return f"the model's in {dtype}, by passes of {self.window} token{'' if self.window == 1 else 's'}"

    def to_dict(self) -> dict[str, Any]:
        """All fields, as values that JSON supports."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return values | {"gb_per_second": self.gb_per_second, "distribution": self.distribution}

    def __str__(self) -> str:
        images = f"{self.images} image{'' if self.images == 1 else 's'}"
        return (
            f"{self.sampler} ({self.exactness}): {self.nfe} NFE for {self.tokens} tokens x {images}, "
            f"{self.tokens_per_pass:.2f} tokens/pass, {self.ms_per_pass:.2f} ms/pass, {self.seconds:.2f} s"
        )

    def __repr__(self) -> str:
        return str(self)  # short, for notebooks; `to_dict` has everything

    def _rows(self) -> list[tuple[str, str]]:
        """The names and values of a notebook's table."""
        what = {
            "exact": "exact: images have the model's own distribution",
            "relaxed": "relaxed: images do not have the model's distribution",
        }.get(self.exactness, self.exactness)
        return [
            ("sampler", f"{self.sampler} {_listed(self.parameters)}".strip()),
            ("distribution", what),
            ("target", self.distribution),
            ("passes (NFE)", f"{self.nfe} for {self.images} x {self.tokens} tokens"),
            ("tokens per pass", f"{self.tokens_per_pass:.2f}"),
            ("a pass", f"{self.ms_per_pass:.2f} ms"),
            ("decoding", f"{self.seconds:.2f} s"),
            ("settings", _listed({"seed": self.seed, **self.settings})),
        ]

    def _repr_html_(self) -> str:
        """A table for notebooks, for light and dark themes."""
        cell = "text-align:left;vertical-align:top;padding:2px 12px 2px 0;background:none;border:0"
        rows = "".join(
            f'<tr style="background:none"><td style="{cell};opacity:.65;white-space:nowrap">{name}</td>'
            f'<td style="{cell}">{escape(value)}</td></tr>'
            for name, value in self._rows()
        )
        return f'<table style="border:0;border-collapse:collapse;color:inherit">{rows}</table>'


@dataclass(frozen=True, repr=False)
class MaskedStats(DecodeStats):
    """Metrics of a masked model, whose passes each call the diffusion head many times in sequence.

    `denoising_steps` is T, the steps that are left of those asked for. `denoiser_calls`: sequential calls of the
    target's head, over all passes, and `calls_per_pass` their mean: T in plain decoding. `evaluations_per_token`: rows
    of those calls for each sampled token, T in plain decoding. `tested` and `accepted` count drafts, up to and with the
    first that is rejected.
    """

    denoising_steps: int
    denoiser_calls: int
    calls_per_pass: float
    evaluations_per_token: float
    tested: int
    accepted: int

    def joined(self, others: Sequence[DecodeStats]) -> Self:
        every: list[MaskedStats] = [self, *cast(Sequence[MaskedStats], others)]
        calls, images = sum(s.denoiser_calls for s in every), sum(s.images for s in every)
        return replace(
            super().joined(others), denoiser_calls=calls,
            calls_per_pass=calls / sum(s.denoiser_calls / s.calls_per_pass for s in every),
            evaluations_per_token=sum(s.evaluations_per_token * s.images for s in every) / images,
            tested=sum(s.tested for s in every), accepted=sum(s.accepted for s in every),
        )  # fmt: skip

    @property
    def acceptance(self) -> float | None:
        """The share of tested drafts that were accepted; None without drafts."""
        return self.accepted / self.tested if self.tested else None

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"acceptance": self.acceptance}

    def __str__(self) -> str:
        drafts = "" if self.acceptance is None else f", {100 * self.acceptance:.0f}% of drafts accepted"
        return (
            f"{super().__str__()}, {self.calls_per_pass:.1f} denoiser calls/pass, "
            f"{self.evaluations_per_token:.0f} head evaluations/token{drafts}"
        )

    def _rows(self) -> list[tuple[str, str]]:
        rows = super()._rows()
        head = f"{self.calls_per_pass:.1f} calls per pass, {self.evaluations_per_token:.0f} evaluations per token"
        drafts = "" if self.acceptance is None else f", {100 * self.acceptance:.0f}% of drafts accepted"
        return [*rows[:-1], ("diffusion head", head + drafts), rows[-1]]


def tokens_per_pass(every: Sequence[DecodeStats]) -> float:
    """Tokens of all over passes of all, for decodings that sample equally many tokens of an image."""
    return len(every) / sum(1 / s.tokens_per_pass for s in every)


def _listed(values: Mapping[str, Any]) -> str:
    """Names and values on one line, without None."""
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def exactness_of(method: Any) -> str:
    """ "exact", "relaxed", or the exactness that a sampler was registered with; of whatever has its `exact` and its
    name, as `name` or as `sampler`."""
    spec = SAMPLERS.get(getattr(method, "name", None) or method.sampler)
    return spec.exactness if spec is not None and spec.exact == method.exact else "exact" if method.exact else "relaxed"
