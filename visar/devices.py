"""Devices by name, looked up before anything is moved there; torch is imported when one is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from visar.errors import VisarError, unknown

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


def placement(*args: Any, **keywords: Any) -> tuple[torch.device | None, torch.dtype | None]:
    """The device and the dtype of a call of `to`, whose arguments are in any order or by name; None is none.

    Raises `VisarError` for two of a kind, for other names, and for a device or a dtype that no model runs on or in.
    """
    import torch

    from visar.dtypes import checked_dtype

    for name in keywords:
        if name not in (known := ("device", "dtype", "torch_dtype")):
            raise unknown("keyword", name, known)
    dtypes = [keywords.get("dtype"), keywords.get("torch_dtype"), *(x for x in args if isinstance(x, torch.dtype))]
    devices = [keywords.get("device"), *(x for x in args if not isinstance(x, torch.dtype))]
    for found in (devices, dtypes):
        found[:] = [value for value in found if value is not None]
        if len(found) > 1:
            raise VisarError(f"`to` takes one device and one dtype, not both {found[0]} and {found[1]}.")
    return (device_of(devices[0]) if devices else None), (checked_dtype("dtype", dtypes[0]) if dtypes else None)
