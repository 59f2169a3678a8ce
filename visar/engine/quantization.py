"""Weights in 8 bits: a pass reads half or a quarter of the bytes.

The linear layers of the blocks are rounded to int8 or float8 e4m3, with one symmetric scale for each output channel.
Activations are not rounded to 8 bits; norms, embeddings and the output head stay native. The result is another
model: samplers are exact for that one. `docs/quantization.md` has quality and speed, and says why not torchao.

On a CPU with VNNI a row x becomes two planes of bytes, x = a (128 hi + lo), and the product is one of integers with
exact sums: activations have 15 bits, where bfloat16 has 8. Elsewhere the weights are converted in each pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from visar.engine.finite import require_finite
from visar.engine.layers import Linear, is_plain
from visar.errors import VisarError, unknown
from visar.kernels.backend import say_once
from visar.kernels.derived import Derived
from visar.kernels.invariant import product
from visar.kernels.linear import epilogue

WEIGHTS = ("native", "int8", "fp8")
NOT_SAVED = "A model with 8-bit weights is not saved; save the native one, which is quantised when loaded."
ROWS = 16  # a hint for oneDNN's layout; any number of rows works
# What holds a number, and the largest; int6 is of files alone (`visar.engine.packed`).
STORED = {"int8": (torch.int8, 127.0), "int6": (torch.int8, 31.0), "fp8": (torch.float8_e4m3fn, 448.0)}


def rounded(weight: Tensor, weights: str) -> tuple[Tensor, Tensor]:
    """`weight` [out, in] in 8 bits and its scales [out], fp32, so that weight is about stored * scale[:, None].

    Raises `VisarError` for weights that are not finite, which 8 bits would hide.
    Whole numbers are off by half a scale at most, float8 by 1/16 of the value (half a scale / 512 below its normal
    numbers).
    """
    dtype, most = STORED[weights]
    require_finite(weight, "The weights to be rounded", weight.dtype)
    w = weight.detach().float()
    scale = w.abs().amax(1) / most
    scale = torch.where(scale > 0, scale, 1.0)
    w = w / scale[:, None]
    return (w.round() if dtype == torch.int8 else w).clamp(-most, most).to(dtype), scale


def planes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows x [M, K] as bytes [2M, K], hi above lo, and scales [M, 1]: x is about scale * (128 hi + lo).

    Bytes are those numbers plus 128. Off by half a scale at most, which is 1 / 32,512 of the row's largest value. A row
    that is not finite has a scale that is not.
    """
    x = x.float()
    scale = x.abs().amax(1, keepdim=True) / (127 * 128)
    q = (x / torch.where(scale == 0, 1.0, scale)).round_()
    hi = (q / 128).round_()
    return torch.cat([hi, q.sub_(hi, alpha=128)]).add_(128).to(torch.uint8), scale


def integer_product(x: Tensor, packed: Tensor, zeros: Tensor, scale: Tensor) -> Tensor:
    """x [M, K] times packed weights [N, K] with scales [N], fp32 [M, N]; `zeros` [N] are int32."""
    rows, own = planes(x)
    out = torch.ops.onednn.qlinear_pointwise(
        rows, 1.0, 128, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    hi, lo = out.chunk(2)
    return torch.add(lo, hi, alpha=128).mul_(own)


class QuantizedLinear(nn.Module):
    """A linear layer whose weight [out, in] is int8 or float8; scales [out] stay fp32 in every dtype, a bias native."""

    weight: nn.Parameter
    scale: Tensor
    weights: str
    fuses = True

    def __init__(self, linear: nn.Linear, weights: str):
        super().__init__()
        stored, scale = rounded(linear.weight, weights)
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self.weights = weights

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        weight, scale = self.weight.data, self.scale
        super()._apply(fn, recurse)
        device = self.scale.device  # `to` may move both, and must round neither
        self.weight.data, self.scale = weight.to(device), scale.to(device)
        return self

    def forward(
        self, x: Tensor, *, silu: bool = False, times: Tensor | None = None, plus: Tensor | None = None
    ) -> Tensor:
        """[..., in] -> [..., out], in the dtype of x; what may follow is that of `visar.engine.layers.Linear`."""
        if x.requires_grad:
            raise VisarError("A model with 8-bit weights cannot be trained; run it under torch.inference_mode().")
        y = self._product(x.flatten(0, -2)).unflatten(0, x.shape[:-1]).to(x.dtype)
        return epilogue(y if self.bias is None else y + self.bias, silu, times, plus)

    def _product(self, x: Tensor) -> Tensor:
        plain = self.weights == "fp8" or x.device.type != "cpu" or torch.compiler.is_compiling()
        if plain or not multiplies_bytes():
            return product(x, self.weight.to(x.dtype)) * self.scale
        return integer_product(x, *_packed.of([self.weight], self._laid_out), self.scale)

    def _laid_out(self) -> tuple[Tensor, Tensor]:
        """The weight in oneDNN's layout, and a zero for each row of it."""
        packed = torch.ops.onednn.qlinear_prepack(self.weight.detach(), [ROWS, self.weight.shape[1]])
        return packed, torch.zeros(len(packed), dtype=torch.int32)

    def extra_repr(self) -> str:
        out, width = self.weight.shape
        return f"in_features={width}, out_features={out}, weights={self.weights}"


_packed: Derived[tuple[Tensor, Tensor]] = Derived()  # in decoding compared once, elsewhere with every product


def multiplies_bytes() -> bool:
    """Whether this CPU sums products of bytes in 32 bits (AVX512-VNNI); older ones may overflow."""
    ours = hasattr(torch.ops.onednn, "qlinear_pointwise") and torch.backends.mkldnn.is_available()
    return ours and torch.cpu._is_vnni_supported()


def check(weights: str, device: torch.device) -> None:
    """Raise `VisarError` for unknown kinds of weights, and those that the device does not support."""
    if weights not in WEIGHTS:
        raise unknown("kind of weights", weights, WEIGHTS)
    if weights != "fp8":
        return
    if device.type != "cuda":
        raise VisarError(f"fp8 weights need a GPU of compute capability 8.9 or more, not a {device.type}; use int8.")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        raise VisarError(f"fp8 weights need compute capability 8.9 or more; this GPU has {major}.{minor}. Use int8.")


def quantize_once(gpt: Any, weights: str) -> None:
    """`quantize`, or nothing for "native". Raises `VisarError` as `check` does, and for weights of another kind."""
    check(weights, gpt.device)
    if (now := weights_of(gpt)) not in ("native", weights):
        raise VisarError(f"The weights are {now} already; load the model again for {weights}.")
    if now != weights:
        quantize(gpt, weights)


def quantize(gpt: Any, weights: str, head: bool = False) -> None:
    """Round the linear layers of a decoder's `layers` in place, and with `head` the output head. This cannot be undone.

    Raises `VisarError` for linear layers with hooks, and of classes that visar does not know. With `head` drafters no
    longer recognise the model, because they compare the signs of its head.
    """
    modules: list[nn.Module] = list(gpt.layers.modules())
    if head:
        modules.append(gpt)
    found = [(m, name, child) for m in modules for name, child in m.named_children() if isinstance(child, nn.Linear)]
    for _, name, child in found:
        if type(child) not in (nn.Linear, Linear) or not is_plain(child):
            raise VisarError(f"The layer {name} ({type(child).__name__}) has been changed, so it cannot be rounded.")
    for module, name, child in found:
        setattr(module, name, QuantizedLinear(child, weights))
    gpt.save_pretrained = _not_saved
    if gpt.device.type != "cpu":
        say_once(f"{weights} weights save memory here and take more time: each pass converts them.")
    elif not multiplies_bytes():
        say_once("This CPU has no AVX512-VNNI: int8 weights save memory, and take more time.")


def weights_of(gpt: nn.Module) -> str:
    """The kind of the layers' weights, one of `WEIGHTS`."""
    return next((m.weights for m in gpt.modules() if isinstance(m, QuantizedLinear)), "native")


def _not_saved(*_: Any, **__: Any) -> None:
    raise VisarError(NOT_SAVED)
