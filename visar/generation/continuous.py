"""One decoding of continuous tokens: orders of positions, session, sampler and stats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from visar.engine.loop import Decoded
from visar.engine.memory import check_memory
from visar.engine.orders import random_orders
from visar.engine.rng import Noise
from visar.errors import VisarError
from visar.families.base import ContinuousFamily, Encoded
from visar.generation.progress import StepCallback
from visar.generation.stats import MaskedStats
from visar.params import SamplingParams
from visar.samplers import ContinuousTarget

# Of a forced token. A layer norm squares sums of it in float32, where infinity would make any token a 0 in silence;
# weights and their sums have 1e8 left.
LARGEST = 1e15

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
) -> tuple[Decoded, MaskedStats]:
    """Tokens and stats for encoded conditions, one row each. Raises `VisarError` as `ImageModel.generate` does."""
    family = cast(ContinuousFamily, model.family)
    target = ContinuousTarget(1.0 if params.temperature is None else params.temperature)
    length = family.layout.length
    forced = None if params.forced_tokens is None else checked_forced(family, params.forced_tokens)
    given = None if forced is None else forced.isfinite().all(-1)
    free = length if given is None else int((~given).sum())
    method = model.fitted(model.sampler_of(sampler, window), default=sampler is None, free=free)
    order = random_orders(noise, length, given)
    fixed = None if forced is None else forced[order[:, : length - free]]
    draft = model.drafters.of(method)
    check_memory(family.bytes_per_image(1, params.guidance_scale != 1), len(order), family.device)
    session = family.session(
        encoded, order, scale=cast(float, params.guidance_scale), schedule=params.guidance_schedule or "linear",
        given=fixed, graphs=model.row_graphs, draft=draft,
    )  # fmt: skip
    # Each pass makes the host wait anyway, so check the rows after each.
    result = model.run(session, method, target, noise, callback, given, every=1)
    calls, evaluations = (sum(getattr(d, n) for d in session.denoisers) for n in ("calls", "evaluations"))
    stats = MaskedStats.of(
        method, params, model.settings_of(params), session, result,
        nfe=result.passes, draft_seconds=session.draft_seconds, draft_passes=session.draft_passes,
        gigabytes=family.bytes_read(session) / 1e9,
        sampled=length - session.given,
        denoising_steps=session.denoisers[0].steps,
        denoiser_calls=calls,
        calls_per_pass=calls / result.passes,
        evaluations_per_token=evaluations / ((length - session.given) * session.batch),
        tested=session.tested,
        accepted=session.accepted,
    )  # fmt: skip
    return result, stats


def checked_forced(family: ContinuousFamily, tokens: Tensor) -> Tensor:
    """The forced tokens [N, d] on the device. Raises `VisarError` unless each is given whole, in range, or NaN."""
    shape, found = (family.layout.length, family.token_dim), ~tokens.isnan()
    whole = tuple(tokens.shape) == shape and bool((found.all(-1) == found.any(-1)).all())
    if not whole or bool((tokens.double().abs() > LARGEST).any()):
        limits = f"in numbers from {-LARGEST:g} to {LARGEST:g}"
        raise VisarError(f"forced_tokens must be {list(shape)}, each token given whole, {limits}, or NaN.")
    if bool(found.all()):
        raise VisarError("forced_tokens gives every token: there is nothing to sample.")
    return tokens.to(family.device)
