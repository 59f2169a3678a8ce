"""Layers with the parameters and keys of torch's own, which run on visar's kernels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visar.errors import VisarError
from visar.kernels.backend import use_triton
from visar.kernels.invariant import Product, by_rows, is_invariant, row_counts
from visar.kernels.linear import epilogue, joined, linear
from visar.kernels.product import product_triton, rms_norm_torch, rms_norm_triton


def check_heads(dim: int, heads: int, multiple: int = 1) -> None:
    """Raise `VisarError` unless a width is that of so many heads, each a multiple of `multiple`."""
    if heads < 1 or dim % heads or dim // heads % multiple:
        each = f" of a multiple of {multiple} each" if multiple > 1 else ""
        raise VisarError(f"A width of {dim} cannot be split into {heads} heads{each}.")


def _kind(silu: bool, times: bool, plus: bool) -> Product:
    """`linear` with what follows it, for `by_rows` to compare row counts with."""
    return lambda x, w, other: linear(x, w, silu=silu, times=other if times else None, plus=other if plus else None)


KINDS = {flags: _kind(*flags) for flags in itertools.product((False, True), repeat=3)}


class Linear(nn.Linear):
    """`torch.nn.Linear`, which on a CPU stores its weight in the order that the processor reads."""

    fuses = True  # takes what follows the product

    def forward(  # type: ignore[override]
        self, x: Tensor, *, silu: bool = False, times: Tensor | None = None, plus: Tensor | None = None
    ) -> Tensor:
        """x [..., K] -> [..., N]; then optionally SiLU, a factor `times` and a summand `plus`, [..., N] each."""
        return run_product(x, self.weight, self.bias, silu=silu, times=times, plus=plus)


def run_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    silu: bool = False,
    times: Tensor | None = None,
    plus: Tensor | None = None,
) -> Tensor:
    """What `Linear` does, of any weight [N, K]; in the invariant mode with rows that do not depend on their number."""
    if not is_invariant():
        return linear(x, weight, bias, silu=silu, times=times, plus=plus)
    kind = KINDS[silu, times is not None, plus is not None]
    plain = not use_triton(x)
    if plain and x.numel() // x.shape[-1] in row_counts(kind, weight):
        return linear(x, weight, bias, silu=silu, times=times, plus=plus)
    rows = x.reshape(-1, x.shape[-1])
    others = [None if t is None else t.reshape(-1, t.shape[-1]) for t in (times, plus)]
    if plain:
        y = by_rows(kind, weight, lambda x, t, p: linear(x, weight, bias, silu=silu, times=t, plus=p), rows, *others)
    else:
        y = product_triton(rows, weight)
        y = epilogue(y if bias is None else y + bias, silu, *others)
    return y.view(*x.shape[:-1], -1)


def run_linear(layer: nn.Module, x: Tensor, **after: Any) -> Tensor:
    """A layer with what follows it; one of another class, such as an adapter of your own, is called without it."""
    return bound_linear(layer)(x, **after)


def bound_linear(layer: nn.Module) -> Callable[..., Tensor]:
    """`run_linear` of a layer that stays as it is, which is then not asked again what it is."""
    if getattr(layer, "fuses", False) and is_plain(layer):  # a hook gets the product alone
        return layer
    if is_torchs(layer):
        parameters: dict[str, Any] = {"weight": layer.weight, "bias": layer.bias}
        return functools.partial(run_product, **parameters)
    return lambda x, **after: epilogue(layer(x), **after)


def bound_joined(layers: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    """The outputs of linear layers of one input, side by side; those of `torch` in one product."""
    biases: list[Any] = [getattr(layer, "bias", None) for layer in layers]
    if is_invariant() or not all(map(is_torchs, layers)) or 0 < sum(b is None for b in biases) < len(biases):
        each = [bound_linear(layer) for layer in layers]
        return lambda x: torch.cat([run(x) for run in each], dim=-1)
    weights: list[Any] = [layer.weight for layer in layers]
    return functools.partial(joined, weights=weights, biases=None if biases[0] is None else biases)


def is_torchs(layer: nn.Module) -> bool:
    """Whether a layer is a linear one of `torch` that nobody changed, so that its weight and bias are all of it."""
    return type(layer) is nn.Linear and is_plain(layer) and type(layer.weight) in (Tensor, nn.Parameter)


def is_plain(module: nn.Module) -> bool:
    """Whether a call of the module is its class's `forward` and no more: no hooks, and no `forward` of its own."""
    own = vars(module)
    return not own["_forward_hooks"] and not own["_forward_pre_hooks"] and "forward" not in own


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # In training a drafter has weights of more bits than the target's features.
        return rms_norm(x.to(torch.promote_types(x.dtype, self.weight.dtype)), self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] over its root mean square, times `weight` [D]; in the invariant mode no sum depends on the rows."""
    if is_invariant() and use_triton(x):
        return rms_norm_triton(x, weight, eps)
    tracing = torch.is_grad_enabled() or torch.compiler.is_compiling()
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and not tracing:
        return rms_norm_torch(x, weight, eps)  # the library's is some ten operations there
    return F.rms_norm(x, weight.shape, weight, eps)
