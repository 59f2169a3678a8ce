"""CLIP features of images and captions (Radford et al. 2021, arXiv:2103.00020), through open_clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from visar.engine.weight_files import read_content
from visar.errors import VisarError
from visar.eval.quality.extractors.base import Extractor, frozen, missing_extra, no_weights, weights_hash

# OpenAI's weights were trained with QuickGELU: under a name without it open_clip would compute other features.
MODELS = {
    "clip-vit-b32": ("ViT-B-32-quickgelu", "openai"),
    "clip-vit-b16": ("ViT-B-16-quickgelu", "openai"),
    "clip-vit-l14-336": ("ViT-L-14-336-quickgelu", "openai"),
}


class Clip(Extractor):
    """ "pool" [B, D]: image features of length 1. `texts` gives those of captions, so their product is the cosine.

    `preprocess` (of a Pillow image) and `tokenizer` are the model's own.
    """

    def __init__(
        self, name: str, model: Any, preprocess: Callable[[Image.Image], Any], tokenizer: Callable[[list[str]], Tensor],
        device: torch.device | str, resize: str, versions: dict[str, str],
    ) -> None:  # fmt: skip
        self.name, self.resize = name, resize
        self.model = frozen(model, device)
        self.preprocess, self.tokenizer, self.device = preprocess, tokenizer, device
        self.weights = weights_hash(model)
        self.versions = versions

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        each = (Image.fromarray(p.permute(1, 2, 0).contiguous().numpy()) for p in images.cpu())
        x = torch.stack([torch.as_tensor(self.preprocess(image)) for image in each]).to(self.device)
        return {"pool": torch.nn.functional.normalize(self.model.encode_image(x), dim=1)}

    def texts(self, captions: Sequence[str]) -> Tensor:
        """Text features [B, D] of length 1, float32 on the CPU; captions too long are cut before the end token."""
        with torch.inference_mode():
            features = self.model.encode_text(self.tokenizer(list(captions)).to(self.device))
            return torch.nn.functional.normalize(features, dim=1).float().cpu()


def clip(
    model: str, pretrained: str, device: torch.device | str = "cpu", weights: str | None = None, name: str | None = None
) -> Clip:
    """A model of open_clip's table with a tag of its weights, or with those of a file (`weights`)."""
    try:
        import open_clip
    except ImportError as error:
        raise missing_extra("CLIP features", error) from error
    if model not in open_clip.list_models():
        raise VisarError(f"open_clip has no model {model!r}; `open_clip.list_models()` names those it has.")
    if weights is not None:
        read_content(weights)  # it says better than open_clip why a file cannot be read
    try:
        network, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=weights or pretrained)
    except Exception as error:  # its downloaders raise errors of many libraries
        raise no_weights("CLIP's weights", pretrained, weights, error) from error
    visual: Any = network.visual
    own = (open_clip.get_model_config(model) or {}).get("text_cfg", {})
    # A tokenizer of the hub is transformers', which would ask on the terminal whether to run the repository's code.
    options = {"trust_remote_code": False} if own.get("hf_tokenizer_name") else {}
    size = visual.image_size if isinstance(visual.image_size, int) else visual.image_size[0]
    return Clip(
        name or f"clip:{model}/{pretrained}", network, preprocess, open_clip.get_tokenizer(model, **options), device,
        f"{size} px, open_clip's own (short side, Pillow bicubic, centre crop)", {"open_clip": open_clip.__version__},
    )  # fmt: skip
