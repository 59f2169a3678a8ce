"""Decoding methods: pure mathematics over a session.

`SAMPLERS` is the table of those for discrete tokens, `CONTINUOUS` of those for masked models of continuous ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from visar.errors import VisarError, unknown
from visar.samplers.autoregressive import Autoregressive
from visar.samplers.base import Sampler, State
from visar.samplers.beam_tree import BeamTree
from visar.samplers.continuous_speculative import ContinuousSpeculative
from visar.samplers.distribution import Target
from visar.samplers.dynamic import DynamicSpeculative
from visar.samplers.head_speculation import HeadSpeculation
from visar.samplers.jacobi import Jacobi, SpeculativeJacobi
from visar.samplers.masked import ContinuousTarget, MaskedAutoregressive, MaskedSampler
from visar.samplers.relaxed import CoolSD, GroupedJacobi, Lantern, LanternPlusPlus
from visar.samplers.speculative import Speculative, TreeSpeculative
from visar.samplers.wavefront import ZipAR

AnySampler = Sampler | MaskedSampler


@dataclass(frozen=True)
class SamplerSpec:
    """A row of the table: how to make the sampler, where it was published, and its drafter."""

    name: str
    make: Callable[[], Any]
    paper: str
    law: str  # "exact", or in what sense it is not
    drafter: str = ""  # the kind of drafter that it needs, one of `visar.drafters.DRAFTERS`, or none

    def parameters(self) -> dict[str, Any]:
        """The sampler's fields and their defaults."""
        made = self.make()
        return {f.name: getattr(made, f.name) for f in fields(made)}  # type: ignore[arg-type]


SAMPLERS: dict[str, SamplerSpec] = {
    spec.name: spec
    for spec in (
        SamplerSpec("ar", Autoregressive, "sequential sampling, the baseline", "exact"),
        SamplerSpec(
            "jacobi", Jacobi, "Song et al. 2021, arXiv:2002.03629", "exact for greedy decoding; does not sample"
        ),
        SamplerSpec("sjd", SpeculativeJacobi, "Teng et al. 2024, arXiv:2410.01699", "exact"),
        SamplerSpec("scd", lambda: SpeculativeJacobi(coupling="maximal"), "MC-SJD / SCD, maximal coupling", "exact"),
        SamplerSpec("scd-gumbel", lambda: SpeculativeJacobi(coupling="gumbel"), "SCD, Gumbel coupling", "exact"),
        SamplerSpec("gsd", GroupedJacobi, "GSD, So et al. 2025", "relaxed"),
        SamplerSpec("speculative", Speculative, "Leviathan et al. 2023, arXiv:2211.17192", "exact", "model"),
        SamplerSpec(
            "speculative-block", lambda: Speculative(verification="block"), "Sun et al. 2024, arXiv:2403.10444",
            "exact", "model",
        ),
        SamplerSpec(
            "speculative-tree", lambda: TreeSpeculative(tree="4x2x1", drafter="model"),
            "RSD-C, Jeon et al. 2024, arXiv:2402.14160", "exact", "model",
        ),
        SamplerSpec(
            "spectr", lambda: TreeSpeculative(tree="4x2x1", children="independent", drafter="model"),
            "SpecTr k-SEQ, Sun et al. 2023, arXiv:2310.15141", "exact", "model",
        ),
        SamplerSpec(
            "specdec++", DynamicSpeculative, "stop rule of SpecDec++, Huang et al. 2024, arXiv:2405.19715", "exact",
            "model",
        ),
        SamplerSpec("eagle", TreeSpeculative, "EAGLE, Li et al. 2024, arXiv:2401.15077", "exact", "eagle"),
        SamplerSpec(
            "eagle-top", lambda: TreeSpeculative(children="chosen"), "EAGLE, its most likely tokens as drafts",
            "exact", "eagle",
        ),
        SamplerSpec("eagle-chain", lambda: Speculative(gamma=5, drafter="eagle"), "EAGLE, a chain", "exact", "eagle"),
        SamplerSpec("eagle2", BeamTree, "EAGLE-2, Li et al. 2024, arXiv:2406.16858", "exact", "eagle"),
        SamplerSpec("rsd-s", lambda: BeamTree(children="drawn", nodes=0), "RSD-S, Jeon et al. 2024, arXiv:2402.14160",
                    "exact", "eagle"),
        SamplerSpec("medusa", lambda: TreeSpeculative(tree="4x2x1", drafter="medusa"),
                    "Medusa, Cai et al. 2024, arXiv:2401.10774", "exact", "medusa"),
        SamplerSpec("hydra", lambda: TreeSpeculative(tree="4x2x1", drafter="hydra"),
                    "Hydra, Ankner et al. 2024, arXiv:2402.05109", "exact", "hydra"),
        SamplerSpec("kangaroo", lambda: Speculative(gamma=3, drafter="exit"),
                    "Kangaroo, Liu et al. 2024, arXiv:2404.18911", "exact", "exit"),
        SamplerSpec("swift", lambda: Speculative(gamma=2, drafter="skip"),
                    "SWIFT, Xia et al. 2024, arXiv:2410.06916", "exact", "skip"),
        SamplerSpec("lantern", Lantern, "Jang et al. 2024, arXiv:2410.03355", "relaxed", "eagle"),
        SamplerSpec("lantern++", LanternPlusPlus, "Park et al. 2025, arXiv:2502.06352", "relaxed", "eagle"),
        SamplerSpec("zipar", ZipAR, "He et al. 2024, arXiv:2412.04062", "relaxed"),
        SamplerSpec("cool-sd", CoolSD, "COOL-SD, arXiv:2601.09212", "relaxed", "eagle"),
    )
}  # fmt: skip
DEFAULT_SAMPLER = "scd"

CONTINUOUS: dict[str, SamplerSpec] = {
    spec.name: spec
    for spec in (
        SamplerSpec("mar", MaskedAutoregressive, "MAR, Li et al. 2024, arXiv:2406.11838, the baseline", "exact"),
        SamplerSpec("mar-256", lambda: MaskedAutoregressive(steps=256), "MAR, a token in each pass", "exact"),
        SamplerSpec("mar-32-50", lambda: MaskedAutoregressive(steps=32, head_steps=50), "MAR, fewer passes and steps",
                    "exact"),
        SamplerSpec("mar-disa", lambda: MaskedAutoregressive(head_steps=50, last_head_steps=5, latest=950),
                    "DiSA, Zhao et al. 2025, arXiv:2505.20297", "relaxed"),
        SamplerSpec("mar-headspec", HeadSpeculation, "speculation in the head, after arXiv:2501.05370", "exact"),
        SamplerSpec("cspd", ContinuousSpeculative, "CSpD, Wang et al. 2024, arXiv:2411.11925", "relaxed", "draft"),
        SamplerSpec("cspd-exact", lambda: ContinuousSpeculative(factor=False, nested=True, prefill=0.0),
                    "CSpD made exact", "exact", "draft"),
    )
}  # fmt: skip
DEFAULT_CONTINUOUS = "mar-headspec"


def samplers_for(tokens: str) -> dict[str, SamplerSpec]:
    return SAMPLERS if tokens == "discrete" else CONTINUOUS


def default_sampler(tokens: str) -> str:
    return DEFAULT_SAMPLER if tokens == "discrete" else DEFAULT_CONTINUOUS


def check_sampler(sampler: Any, tokens: str) -> None:
    if not isinstance(sampler, tuple({type(spec.make()) for spec in samplers_for(tokens).values()})):
        raise VisarError(
            f"Sampler {sampler.name!r} does not decode this model; those that do: {', '.join(samplers_for(tokens))}."
        )


def spec_of(name: str) -> SamplerSpec:
    """The row of either table; a `VisarError` for a name in neither."""
    if name not in SAMPLERS and name not in CONTINUOUS:
        raise unknown("sampler", name, [*SAMPLERS, *CONTINUOUS])
    return SAMPLERS[name] if name in SAMPLERS else CONTINUOUS[name]


def get_sampler(sampler: str | AnySampler, **parameters: Any) -> Any:
    """A sampler by name, or the one given, with some of its fields replaced; `None` values are ignored.

    Raises `VisarError` for a name that is in no table or a parameter that the sampler does not have.
    """
    made: Any = spec_of(sampler).make() if isinstance(sampler, str) else sampler
    given = {k: v for k, v in parameters.items() if v is not None}
    allowed = {f.name for f in fields(made)}
    for name in given:
        if name not in allowed:
            raise VisarError(
                f"Sampler {made.name!r} has no parameter {name!r}; it has {', '.join(sorted(allowed)) or 'none'}."
            )
    return replace(made, **given) if given else made


__all__ = [
    "CONTINUOUS",
    "DEFAULT_CONTINUOUS",
    "DEFAULT_SAMPLER",
    "SAMPLERS",
    "AnySampler",
    "Autoregressive",
    "BeamTree",
    "ContinuousSpeculative",
    "ContinuousTarget",
    "CoolSD",
    "DynamicSpeculative",
    "GroupedJacobi",
    "HeadSpeculation",
    "Jacobi",
    "Lantern",
    "LanternPlusPlus",
    "MaskedAutoregressive",
    "MaskedSampler",
    "Sampler",
    "SamplerSpec",
    "Speculative",
    "SpeculativeJacobi",
    "State",
    "Target",
    "TreeSpeculative",
    "ZipAR",
    "get_sampler",
    "spec_of",
]
