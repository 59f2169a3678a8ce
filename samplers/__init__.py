"""Decoding methods: pure mathematics over a session. `SAMPLERS` is the table; classes are imported when asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from visar.samplers.registry import (
    DEFAULTS,
    SAMPLERS,
    SamplerSpec,
    check_sampler,
    default_sampler,
    get_sampler,
    load_sampler,
    register_sampler,
    samplers_for,
    scan_of,
    spec_of,
    values_of,
)

if TYPE_CHECKING:
    from visar.samplers.autoregressive import Autoregressive
    from visar.samplers.base import Sampler, State
    from visar.samplers.beam_tree import BeamTree
    from visar.samplers.continuous_speculative import ContinuousSpeculative
    from visar.samplers.diagonal import Diagonal
    from visar.samplers.distribution import RowTargets, Target
    from visar.samplers.dynamic import DynamicSpeculative
    from visar.samplers.dynamic_trees import CalibratedTree, DynamicDepth
    from visar.samplers.head_speculation import HeadSpeculation
    from visar.samplers.jacobi import Jacobi, SpeculativeJacobi
    from visar.samplers.masked import AnySampler, ContinuousTarget, MaskedAutoregressive, MaskedSampler
    from visar.samplers.parallel import Parallel
    from visar.samplers.relaxed import CoolSD, GroupedJacobi, Lantern, LanternPlusPlus
    from visar.samplers.speculative import Speculative, TreeSpeculative
    from visar.samplers.thresholds import Blockwise, Typical
    from visar.samplers.wavefront import ZipAR

_HOMES = {
    "autoregressive": ("Autoregressive",),
    "base": ("Sampler", "State"),
    "beam_tree": ("BeamTree",),
    "continuous_speculative": ("ContinuousSpeculative",),
    "diagonal": ("Diagonal",),
    "distribution": ("RowTargets", "Target"),
    "dynamic": ("DynamicSpeculative",),
    "dynamic_trees": ("CalibratedTree", "DynamicDepth"),
    "head_speculation": ("HeadSpeculation",),
    "jacobi": ("Jacobi", "SpeculativeJacobi"),
    "masked": ("AnySampler", "ContinuousTarget", "MaskedAutoregressive", "MaskedSampler"),
    "parallel": ("Parallel",),
    "relaxed": ("CoolSD", "GroupedJacobi", "Lantern", "LanternPlusPlus"),
    "speculative": ("Speculative", "TreeSpeculative"),
    "thresholds": ("Blockwise", "Typical"),
    "wavefront": ("ZipAR",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"visar.samplers.{home}"), name)
    raise AttributeError(f"module 'visar.samplers' has no attribute {name!r}")


__all__ = [
    "DEFAULTS",
    "SAMPLERS",
    "AnySampler",
    "Autoregressive",
    "BeamTree",
    "Blockwise",
    "CalibratedTree",
    "ContinuousSpeculative",
    "ContinuousTarget",
    "CoolSD",
    "Diagonal",
    "DynamicDepth",
    "DynamicSpeculative",
    "GroupedJacobi",
    "HeadSpeculation",
    "Jacobi",
    "Lantern",
    "LanternPlusPlus",
    "MaskedAutoregressive",
    "MaskedSampler",
    "Parallel",
    "RowTargets",
    "Sampler",
    "SamplerSpec",
    "Speculative",
    "SpeculativeJacobi",
    "State",
    "Target",
    "TreeSpeculative",
    "Typical",
    "ZipAR",
    "check_sampler",
    "default_sampler",
    "get_sampler",
    "load_sampler",
    "register_sampler",
    "samplers_for",
    "scan_of",
    "spec_of",
    "values_of",
]
