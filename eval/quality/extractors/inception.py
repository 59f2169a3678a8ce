"""Inception-v3 of 2015 (Szegedy et al., arXiv:1512.00567), whose features FID, sFID, IS, KID and precision are of.

The network is torch-fidelity's, which was tested against the TensorFlow graph. The resizing before it is ours, because
it is what protocols differ in: TensorFlow 1's (ADM), Pillow's (clean-fid), or torch's (pytorch-fid).
"""

from __future__ import annotations

import os
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

from visar.engine.weight_files import read_content
from visar.errors import VisarError, unknown
from visar.eval.quality.extractors.base import Extractor, frozen, missing_extra, weights_hash
from visar.eval.quality.extractors.resize import network_input

VARIABLE = "VISAR_INCEPTION"
SIZE = 299
RESIZES = {
    "tf1": "299 px, TensorFlow 1 bilinear, not antialiased",
    "clean": "299 px, Pillow bicubic in floats per channel",
    "pytorch": "299 px, torch bilinear, not antialiased",
}
_LAYERS = (
    "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2",
    "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7a",
    "Mixed_7b", "Mixed_7c", "AvgPool",
)  # fmt: skip
_SPATIAL_CHANNELS = 7


class Inception(Extractor):
    """ "pool" [B, 2048]; "logits" [B, 1008] without the bias, as ADM's; "spatial" [B, 2023] for sFID.

    The spatial features (Nash et al. 2021, arXiv:2103.03841) are what ADM's evaluator calls `mixed_6/conv:0`: the first
    7 channels of the 1x1 branch of `Mixed_6d`, after its ReLU, 17 x 17, with the channel last as TensorFlow lays it
    out, so that published `mu_s` and `sigma_s` fit.
    """

    def __init__(self, model: Any, resize: str, device: torch.device | str, versions: dict[str, str]) -> None:
        if resize not in RESIZES:
            raise unknown("resizing", resize, RESIZES)
        self.kind = resize
        self.name, self.resize = f"inception-{resize}", RESIZES[resize]
        self.model = frozen(model, device)
        self.device = device
        self.weights = weights_hash(model)
        self.versions = versions

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        x = network_input(self.kind, images, SIZE).to(self.device)
        x = 2 * (x / 255) - 1 if self.kind == "pytorch" else (x - 128) / 128  # white is 1 there, and 127/128 elsewhere
        spatial = x
        for layer in _LAYERS:
            module = getattr(self.model, layer)
            if layer == "Mixed_6d":
                spatial = module.branch1x1(x)[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
            x = module(x)
        pool = x.flatten(1)
        return {"pool": pool, "spatial": spatial, "logits": pool @ self.model.fc.weight.T}


def inception(resize: str = "tf1", device: torch.device | str = "cpu", weights: str | None = None) -> Inception:
    """The network with weights from a file (`weights`, else the variable VISAR_INCEPTION), else downloaded.

    The file is torch-fidelity's or pytorch-fid's, which hold the same tensors.
    """
    try:
        import torch_fidelity
        from torch_fidelity import feature_extractor_inceptionv3 as source
    except ImportError as error:
        raise missing_extra("Inception features", error) from error
    path = weights or os.environ.get(VARIABLE) or None
    try:
        weights_file = None if path is None else _safe(path)
        model = source.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=weights_file)
    except (RuntimeError, TypeError, AttributeError) as error:
        if path is None:
            raise _not_there(source.URL_INCEPTION_V3, error) from error
        raise VisarError(f"{path} does not hold the weights of FID's Inception.") from error
    except OSError as error:
        raise _not_there(source.URL_INCEPTION_V3, error) from error
    return Inception(model, resize, device, {"torch-fidelity": torch_fidelity.__version__})


def _safe(path: str) -> BytesIO:
    """A torch file of the tensors in the file: torch-fidelity would run what else is in it."""
    content = BytesIO()
    torch.save(read_content(path), content)
    content.seek(0)
    return content


def _not_there(url: str, error: Exception) -> VisarError:
    return VisarError(
        f"Inception's weights could not be downloaded ({error}): fetch {url} elsewhere, and name the file in the "
        f"variable {VARIABLE} or as the weights."
    )
