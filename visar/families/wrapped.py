"""Wrappers and patches of components that decoding would pass by, and components of a wrong class: refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from visar.engine.component import Component
from visar.errors import VisarError

NO_EFFECT = "visar runs the layers of a model itself, as CUDA graphs on a GPU"


def check_component(name: str, component: Any, kind: type) -> None:
    """Raise `VisarError` unless the component `name` is a `kind` without a wrapper."""
    check_unwrapped(name, component)
    if not isinstance(component, kind):
        given = "None" if component is None else f"a {type(component).__name__}"
        raise VisarError(f"{name} must be a {kind.__name__}, not {given}.")


def check_unwrapped(name: str, component: Any) -> None:
    """Raise `VisarError` for a wrapper or a patch of a component that would have no effect."""
    wrapper = type(component).__name__
    if wrapper == "OptimizedModule" or getattr(component, "_compiled_call_impl", None) is not None:
        raise VisarError(f"torch.compile has no effect on {name}: {NO_EFFECT}. Give the original model.")
    if wrapper in ("DataParallel", "DistributedDataParallel"):
        raise VisarError(f"{wrapper} does not split decoding; run `visar sample` under torchrun for several GPUs.")
    hooks = [*getattr(component, "_forward_hooks", ()), *getattr(component, "_forward_pre_hooks", ())]
    if hooks or "forward" in getattr(component, "__dict__", ()):
        what = "A forward hook" if hooks else "Another forward"
        raise VisarError(f"{what} of {name} has no effect: {NO_EFFECT}. Put it on one of its layers.")
    if passed_by := getattr(type(component), "passed_by", ()):
        inner = dict(component.named_modules())
        for layer in passed_by:
            check_unwrapped(f"{name}.{layer}", inner.get(layer))


def check_one_dtype(name: str, component: Any) -> None:
    """Raise `VisarError` for a network of visar's with layers in several dtypes, which its products cannot mix.

    Layers of a user's own may convert as they like, and 8-bit weights do.
    """
    if isinstance(component, Component):
        check_same_dtype(name, component)


def check_same_dtype(name: str, *modules: nn.Module) -> None:
    """Raise `VisarError` for modules of a network with weights in several dtypes."""
    every = (p for module in modules for p in _own_weights(module))
    found = {p.dtype for p in every if p.is_floating_point() and p.dtype.itemsize > 1}
    if len(found) > 1:
        words = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise VisarError(f"{name} has weights in {words}; convert all of it to one with .to(dtype).")


def _own_weights(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a module and of the layers within it that are no adapters and share their dtype."""
    norm = isinstance(module, nn.GroupNorm | nn.LayerNorm)  # torch's on a CPU take 16 bits with weights in float32
    for parameter in module.parameters(recurse=False):
        if not (norm and parameter.dtype == torch.float32 and parameter.device.type == "cpu"):
            yield parameter
    for name, layer in module.named_children():
        own = type(layer).__module__.startswith(("visar.", "torch.nn.", "transformers.models."))
        if own and name not in getattr(type(module), "own_dtype", ()):
            yield from _own_weights(layer)


def check_layers(model: Any) -> None:
    """Raise `VisarError` for layers that decoding cannot run: adapters that are not merged, and offloaded weights."""
    for layer in model.modules():
        if hasattr(layer, "base_layer") and hasattr(layer, "active_adapters"):
            raise VisarError("Adapter layers (PEFT) cannot be decoded with; merge them first (merge_and_unload).")
    check_offloaded(model)


def check_offloaded(model: Any) -> None:
    """Raise `VisarError` for weights that are not on the device when a pass begins."""
    for layer in model.modules():
        if hasattr(layer, "_hf_hook"):
            raise VisarError("Weights that are offloaded cannot be decoded with; move the model with .to(device).")
    check_filled("The model", model)


def check_filled(name: str, component: Any) -> None:
    """Raise `VisarError` for a component on the device 'meta'."""
    if any(p.is_meta for p in getattr(component, "parameters", tuple)()):
        raise VisarError(f"{name} is on the device 'meta', which holds no weights; load it on a CPU or GPU.")
