"""Devices by name, looked up before anything is moved there; torch is imported when one is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from visar.errors import VisarError

if TYPE_CHECKING:
    import torch


def device_of(name: str | torch.device) -> torch.device:
    """The device of a name, "auto" being the GPU where there is one; a `VisarError` if it is not there."""
    import torch

    name = str(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise VisarError(f"Unknown device {name!r}; use auto, cpu, cuda or cuda:N.") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise VisarError(f"Device {name!r} is not there; this machine has {count} CUDA devices.")
    if device.type not in ("cpu", "cuda"):
        raise VisarError(f"Device {name!r} is not supported; use auto, cpu, cuda or cuda:N.")
    return device
