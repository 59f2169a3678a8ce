"""Whether numbers are finite: asked of tensors on the device, read by the host where it waits anyway."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from visar.errors import VisarError


def is_finite(x: Tensor) -> Tensor:
    """A 0-d bool on the device of x: no entry is NaN or infinite. One sweep, with no tensor of the size of x."""
    if not x.is_floating_point() or x.dtype.itemsize == 1 or not x.numel():
        return torch.ones((), dtype=torch.bool, device=x.device)  # 8-bit weights were checked when they were rounded
    least, most = x.detach().aminmax()
    return least.isfinite() & most.isfinite()


def require_finite(values: Tensor, what: str, dtype: torch.dtype) -> None:
    """Raise `VisarError` for values that overflowed in `dtype`, or that weights which are not finite gave."""
    if bool(is_finite(values)):
        return
    name = str(dtype).removeprefix("torch.")
    todo = "load the model in bfloat16 or float32" if dtype == torch.float16 else "its weights are damaged or too large"
    raise VisarError(f"{what} are not finite in {name}; {todo}.")


def require_finite_weights(module: nn.Module, what: str) -> None:
    """Raise `VisarError` where a parameter or buffer of `module` has values that are not finite, naming the first."""
    named = {name: t for part in (module.named_parameters(), module.named_buffers()) for name, t in part}
    if all_finite(named.values()):
        return
    bad = next(name for name, t in named.items() if not bool(is_finite(t)))
    raise VisarError(f"The weights of {what} are not finite: {bad} holds NaN or infinity.")


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all entries of all tensors are finite; the host waits once for each device."""
    found: dict[torch.device, list[Tensor]] = {}
    for t in tensors:
        found.setdefault(t.device, []).append(is_finite(t))
    return all(bool(torch.stack(flags).all()) for flags in found.values())
