"""What every feature extractor is: uint8 images in, named features out, and the facts that a result must carry."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from visar.errors import VisarError

# uint8 images [B, 3, H, W] -> features by name, each [B, D]; every `Extractor` is one
Features = Callable[[Tensor], dict[str, Tensor]]


class Extractor(ABC):
    """Turns uint8 images [B, 3, H, W] of any size into float32 features on the CPU.

    `name` is its name in results, `weights` the sha256 (hex) of its weights, `resize` its resizing in words, and
    `versions` the libraries that its features depend on. Every image's features are its own: the rest of a batch
    does not matter.
    """

    name: str
    weights: str
    resize: str
    versions: dict[str, str]

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Features by name: always "pool" [B, D]; some also have "spatial" [B, S] and "logits" [B, C]."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise VisarError(f"Features are of uint8 images [B, 3, H, W], not of {images.dtype} {[*images.shape]}.")
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # TF32 is off by a thousandth
        with torch.inference_mode(), exact:
            return {name: found.float().cpu() for name, found in self.extract(images).items()}

    def each(self, batches: Iterable[Tensor]) -> Iterator[dict[str, Tensor]]:
        """The features of each of many batches, in order."""
        return map(self, batches)

    @abstractmethod
    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """The same, for images that were looked at, without gradients."""


def as_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1], rounded and clipped once: what a PNG of them would hold."""
    return images.mul(255).round().clamp(0, 255).to(torch.uint8)


def frozen(model: Any, device: torch.device | str) -> Any:
    """The network as it is used here: evaluated, never trained."""
    return model.eval().requires_grad_(False).to(device)


def weights_hash(model: nn.Module) -> str:
    """sha256 (hex) of all tensors of the network by name, however they were stored."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def missing_extra(what: str, error: ImportError) -> VisarError:
    """The error where the libraries of the extra `eval` are not there."""
    return VisarError(f"{what} need the extra `eval`: uv sync --extra eval, or pip install 'visar[eval]' ({error}).")


def no_weights(what: str, name: str, file: str | None, error: Exception) -> VisarError:
    """The error for weights that could not be loaded from `file`, or downloaded by their name."""
    source = f"from {file}" if file else f"of {name!r}, which may be a download,"
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return VisarError(f"{what} {source} could not be loaded ({reason}): give a file of them as the weights.")
