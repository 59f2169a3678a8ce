"""One decoding of discrete tokens: session, sampler and stats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from visar.engine.guidance import Guidance
from visar.engine.loop import Decoded
from visar.engine.orders import orders_of
from visar.engine.rng import Noise
from visar.errors import VisarError
from visar.families.base import DiscreteFamily, Encoded
from visar.generation.progress import StepCallback
from visar.generation.sessions import Call
from visar.generation.stats import DecodeStats
from visar.params import SamplingParams
from visar.samplers import Target
from visar.samplers.distribution import is_whole

if TYPE_CHECKING:
    from visar.generation.model import ImageModel


def run(
    model: ImageModel,
    encoded: Encoded,
    noise: Noise,
    params: SamplingParams,
    sampler: Any,
    window: int | None,
    callback: StepCallback | None,
) -> tuple[Decoded, DecodeStats]:
    """Tokens and stats for encoded conditions, one row each. Raises `VisarError` as `ImageModel.generate` does."""
    family = cast(DiscreteFamily, model.family)
    method = model.sampler_of(sampler, window)
    target = target_of(family, params)
    encoded = arranged(encoded, family, params, noise)
    call = Call(family, model.drafters.of(method), encoded, method, target, guidance_of(params))
    # A progress bar alone does not need every pass of a GPU.
    every = None if callback is None else 1
    session, result = model.sessions.run(
        call,
        lambda session, graph: model.run(session, method, target, noise, callback, every=every, graph=graph),
    )
    drafter, drafting = session.drafter, dict[str, Any](draft_seconds=0.0, draft_passes=0)
    if drafter is not None:
        drafting = {"draft_seconds": drafter.seconds, "draft_passes": drafter.passes}
        if result.replays:
            drafting = dict.fromkeys(drafting)  # a graph cannot be timed inside
    stats = DecodeStats.of(
        method, params, model.settings_of(params), session, result,
        nfe=result.passes + session.prefill_passes, **drafting,
        gigabytes=(family.bytes_per_pass * result.passes + result.bytes_read) / 1e9,
    )  # fmt: skip
    return result, stats


def guidance_of(params: SamplingParams) -> Guidance:
    """The guidance of resolved settings."""
    interval = -1 if params.guidance_interval is None else params.guidance_interval
    return Guidance(cast(float, params.guidance_scale), interval, params.guidance_schedule == "linear")


def arranged(encoded: Encoded, family: DiscreteFamily, params: SamplingParams, noise: Noise) -> Encoded:
    """Encoded conditions with the order in which each image's tokens are sampled, of a model that takes one."""
    if params.order is None:
        return encoded
    return *encoded[:-1], orders_of(params.order, family.layout, noise).to(family.device)


def target_of(family: DiscreteFamily, params: SamplingParams) -> Target:
    """The target of the settings, the caller's forced tokens and the family's own. Raises `VisarError`."""
    forced, own = params.forced_tokens, family.forced
    if forced is not None and (
        not is_whole(forced) or tuple(forced.shape) != (family.layout.length,) or bool((forced.long() < -1).any())
    ):
        least = f" down to {int(forced.long().min())}" if is_whole(forced) and forced.numel() else ""
        raise VisarError(
            f"forced_tokens must hold {family.layout.length} whole numbers, -1 where a token is sampled, not "
            f"{str(forced.dtype).removeprefix('torch.')} of shape {list(forced.shape)}{least}."
        )
    if own is not None:
        forced = own if forced is None else torch.where(own >= 0, own, forced.to(own))
    return Target(
        1.0 if params.temperature is None else params.temperature,
        params.top_k or 0,
        1.0 if params.top_p is None else params.top_p,
        forced,
        family.allowed,
    )


def misplaced(family: DiscreteFamily, tokens: Tensor) -> Tensor:
    """The ids in tokens [B, N] that no image has at their position; the decoder knows those above its codebook."""
    bad, free = tokens < 0, torch.ones_like(tokens, dtype=torch.bool)
    if family.forced is not None:
        forced = family.forced.to(tokens.device)
        free = (forced < 0).expand_as(tokens)
        bad |= ~free & (tokens != forced)
    if family.allowed is not None:
        allowed = family.allowed.to(tokens.device)
        bad |= free & ~allowed[tokens.clamp(0, len(allowed) - 1)]
    return tokens[bad]
