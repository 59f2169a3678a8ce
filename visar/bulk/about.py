"""What run it is: all that decides its images, and the machine and versions that made them."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from typing import Any

import PIL
import torch

from visar import __version__
from visar.errors import VisarError
from visar.pipelines.base import ImagePipeline
from visar.pipelines.masked import MaskedPipeline
from visar.samplers import DEFAULT_CONTINUOUS, DEFAULT_SAMPLER, AnySampler, get_sampler

FORMAT = 1  # of the folder
SAMPLE = 4096  # numbers of each tensor that the mark of the weights reads
# What a pipeline is told beside sampler, seed and image index, and what it is if neither caller nor model says so.
SETTINGS: dict[str, Any] = {
    "guidance_scale": None, "guidance_interval": -1, "guidance_schedule": None, "temperature": 1.0, "top_k": 0,
    "top_p": 1.0,
}  # fmt: skip


def resolved_sampler(pipe: ImagePipeline, sampler: str | AnySampler | None) -> Any:
    """The sampler that the pipeline would use, as an object. Raises `VisarError` if it is of another family."""
    if sampler is not None:
        return pipe.fitted(pipe.sampler_of(sampler))
    if isinstance(pipe, MaskedPipeline):
        made = get_sampler(DEFAULT_CONTINUOUS)
        return get_sampler(made, steps=min(made.steps, pipe.model.length))
    return pipe.fitted(get_sampler(DEFAULT_SAMPLER))


def resolved_settings(pipe: ImagePipeline, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, with the model's own in the place of None. Raises `VisarError` for a setting that there is not."""
    for name in given:
        if name not in SETTINGS:
            raise VisarError(f"There is no setting {name!r}; there are {', '.join(SETTINGS)}.")
    own = {name: pipe.config.get(name) for name in SETTINGS}
    out = {}
    for name, default in SETTINGS.items():
        choices = (given.get(name), own[name], default)
        out[name] = next((choice for choice in choices if choice is not None), None)
    return out


def weights_mark(pipe: ImagePipeline) -> str:
    """A hash of every part's tensors: names, shapes, and up to `SAMPLE` numbers of each, evenly spread."""
    mark = hashlib.sha256()
    for part, module in sorted(pipe.stored_parts().items()):
        for name, tensor in sorted(module.state_dict().items()):
            flat = tensor.detach().flatten()
            few = flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE].double().cpu().contiguous()
            mark.update(f"{part}.{name} {list(tensor.shape)}".encode())
            mark.update(few.numpy().tobytes())
    return mark.hexdigest()[:16]


def method_of(sampler: Any) -> dict[str, Any]:
    """Name, parameters and law of a sampler."""
    parameters = {f.name: getattr(sampler, f.name) for f in fields(sampler)}
    return {"sampler": sampler.name, "parameters": parameters, "exact": sampler.exact}


def machine(pipe: ImagePipeline) -> dict[str, Any]:
    """What rounding may depend on: device, threads and versions."""
    device = pipe.model.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() or "cpu",
        "threads": torch.get_num_threads(),
        "visar": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "pillow": PIL.__version__,
        "python": platform.python_version(),
    }


def changed(old: Sequence[Mapping[str, Any]], new: Mapping[str, Any]) -> str:
    """How a machine differs from those that worked on a run before, in words; "" if it is one of them."""
    if not old or new in old:
        return ""
    last = old[-1]
    return ", ".join(f"{name} was {last.get(name)}, now {new[name]}" for name in new if last.get(name) != new[name])
