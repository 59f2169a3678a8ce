"""The arguments of a diffusers call, and of its loading, as what `ImageModel` takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from visar.devices import device_of
from visar.dtypes import checked_dtype
from visar.errors import VisarError, unknown
from visar.generation.model import ImageModel
from visar.generation.progress import Progress, StepCallback, check_callback
from visar.params import is_list, whole
from visar.samplers import get_sampler

CALLBACK_INPUTS = ("tokens", "commit_pass", "lengths")  # tensors that `callback_on_step_end` may ask for


def seeds_of(generator: Any, images: int) -> int | list[int]:
    """The seed of a call for a `torch.Generator`; for a list of them, one for each image.

    A seed is a random number of the generator, so that successive calls with one generator give different images, and
    generators with equal seeds give equal images. Raises `VisarError` for other types.
    """
    generators = list(generator) if is_list(generator) else [generator]
    for one in generators:
        if not isinstance(one, torch.Generator):
            raise VisarError(f"generator must be a torch.Generator, not a {type(one).__name__}; or give seed=.")
    if len(generators) not in (1, images):
        raise VisarError(f"There are {len(generators)} generators for {images} images; give one, or one for each.")
    seeds = [int(torch.randint(2**62, (), generator=one, device=one.device)) for one in generators]
    return seeds[0] if len(seeds) == 1 else seeds


def with_steps(model: ImageModel, sampler: Any, steps: int | None) -> Any:
    """The sampler with this number of passes, if one is given. Raises `VisarError` if it has no fixed number."""
    if steps is None:
        return sampler
    method = model.sampler_of(sampler)
    if "steps" not in getattr(method, "__dataclass_fields__", {}):
        raise VisarError(
            f"num_inference_steps has no meaning for the sampler {method.name!r}, which ends when all tokens are "
            "committed; samplers of continuous tokens have steps."
        )
    return get_sampler(method, steps=whole("num_inference_steps", steps))


def step_callback(pipe: Any, callback: Callable[..., Any], names: Sequence[str] | None) -> StepCallback:
    """`callback(pipe, step, timestep, tensors)` as in diffusers; the step counts passes from 0."""
    names = getattr(callback, "tensor_inputs", names)  # a callback object of diffusers
    names = CALLBACK_INPUTS if names is None else [names] if isinstance(names, str) else names
    if not isinstance(names, Iterable):
        raise VisarError(f"callback_on_step_end_tensor_inputs must be a list of names, not {names!r}.")
    names = list(names)
    for name in names:
        if name not in CALLBACK_INPUTS:
            raise unknown("callback tensor", name, CALLBACK_INPUTS)
    check_callback("callback_on_step_end", callback, ("pipe", "step", "timestep", "tensors"))

    def tell(now: Progress) -> None:
        tensors = {name: getattr(now, name) for name in names}
        versions = {name: value._version for name, value in tensors.items()}
        returned = callback(pipe, now.passes - 1, now.passes - 1, dict(tensors))
        found = returned if isinstance(returned, Mapping) else {}
        changed = [
            name
            for name, value in tensors.items()
            if value._version != versions[name] or not _same(found.get(name, value), value)
        ]
        if changed or not isinstance(returned, Mapping | None):
            raise VisarError(
                f"callback_on_step_end cannot change {', '.join(changed or names)}: that would change the sampled "
                "distribution. Return the tensors as they are, or nothing."
            )
        if getattr(pipe, "_interrupt", False):
            pipe._interrupt = False
            raise VisarError("An image that is not finished cannot be returned; raise an exception to stop decoding.")

    return tell


def _same(given: Any, own: Tensor) -> bool:
    return given is own or (isinstance(given, Tensor) and torch.equal(given, own))


def dtype_of(loading: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that `dtype` or `torch_dtype` names, None without both.

    Raises `VisarError` for one that no model runs in.
    """
    asked = [value for key in ("dtype", "torch_dtype") if (value := loading.get(key)) is not None]
    dtypes = {checked_dtype("dtype", value) for value in asked}
    if len(dtypes) > 1:
        raise VisarError("dtype and torch_dtype are two names of one thing; give one of them.")
    return dtypes.pop() if dtypes else None


def device_from(device_map: Any) -> torch.device | None:
    """The one device that a `device_map` names. Raises `VisarError` for a map that spreads a model."""
    spread = ("auto", "balanced", "sequential", "balanced_low_0")
    if device_map is None:
        return None
    if isinstance(device_map, str | torch.device) and device_map not in spread:
        return device_of(device_map)
    raise VisarError(f"device_map must be one device, such as 'cuda', not {device_map!r}: a model is on one device.")
