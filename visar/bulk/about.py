"""The description of a run: everything that its images depend on, and machines and versions."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from typing import Any

import PIL
import torch

from visar import __version__
from visar.errors import VisarError
from visar.generation.model import ImageModel
from visar.params import TAKES, SamplingParams
from visar.samplers import values_of

FORMAT = 1  # of the folder
# Values in run.json of settings that this kind of model does not have, so that earlier versions' runs can continue.
UNUSED = {"guidance_interval": -1, "guidance_schedule": None, "top_k": 0, "top_p": 1.0}
LATER = ("invariant", "order")  # left out where not used, so that runs from before there was one can continue
SAMPLE = 4096  # numbers of each tensor in the hash of the weights


def sampler_of(model: ImageModel, sampler: Any) -> Any:
    """The sampler as an object. Raises `VisarError` if it is for another kind of tokens."""
    return model.sampler_of(sampler)


def settings_of(model: ImageModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, with the model's default for None. Raises `VisarError` for a setting that the model does not have."""
    if given.get("forced_tokens") is not None:
        raise VisarError("Bulk runs take no forced tokens; call the model for those.")
    params, kind, takes = model.params_of(**given), model.family.tokens, TAKES.get(model.family.scan, ())
    named = {f.name: f.metadata["only"] for f in fields(SamplingParams) if f.name in params.to_dict()}
    return {
        name: getattr(params, name) if only in ("", kind) or name in takes else UNUSED.get(name)
        for name, only in named.items()
        if name != "seed" and (name not in LATER or getattr(params, name))
    }


def weights_mark(model: ImageModel) -> str:
    """A hash of all components' tensors: names, shapes, and up to `SAMPLE` evenly spaced numbers of each."""
    mark = hashlib.sha256()
    for part, module in sorted(model.family.components.items()):
        for name, tensor in sorted(module.state_dict().items() if hasattr(module, "state_dict") else ()):
            flat = tensor.detach().flatten()
            few = flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE].double().cpu().contiguous()
            mark.update(f"{part}.{name} {list(tensor.shape)}".encode())
            mark.update(few.numpy().tobytes())
    return mark.hexdigest()[:16]


def method_of(sampler: Any) -> dict[str, Any]:
    """Name and parameters of a sampler, as JSON has them, and whether it is exact."""
    parameters = json.loads(json.dumps(values_of(sampler), default=lambda value: type(value).__name__))
    return {"sampler": sampler.name, "parameters": parameters, "exact": sampler.exact}


def machine(model: ImageModel) -> dict[str, Any]:
    """Device, threads and versions, on which rounding can depend."""
    device = model.device
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
    """The differences of a machine from the last one of a run, in words; "" if the run has used it."""
    if not old or new in old:
        return ""
    last = old[-1]
    return ", ".join(f"{name} was {last.get(name)}, now {new[name]}" for name in new if last.get(name) != new[name])
