"""From an ImageNet class to images."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from visar.errors import VisarError
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.loading import load_gpt, load_vq
from visar.families.llamagen.vq import VQModel
from visar.families.specs import MAR_MODELS, MODELS, match_mar
from visar.pipelines.base import ImageOutput, ImagePipeline
from visar.pipelines.progress import StepCallback
from visar.pipelines.text_to_image import _grid
from visar.samplers import AnySampler


class ClassToImagePipeline(ImagePipeline):
    """LlamaGen's class-conditional models."""

    component_classes: ClassVar[dict[str, Any]] = {"gpt": LlamaGen, "vq": VQModel}

    def __init__(
        self,
        gpt: LlamaGen,
        vq: VQModel,
        grid: int | None = None,
        guidance_scale: float = MODELS["llamagen-l"].guidance,
        top_k: int = MODELS["llamagen-l"].top_k,
    ):
        super().__init__()
        self.register_modules(gpt=gpt, vq=vq)
        self.register_to_config(grid=grid, guidance_scale=guidance_scale, top_k=top_k)

    @classmethod
    def from_single_file(
        cls,
        gpt: str | Path | None = None,
        *,
        vq: str | Path | None = None,
        mar: str | Path | None = None,
        vae: str | Path | None = None,
        image_size: int | None = None,
        num_heads: int | None = None,
    ) -> Any:
        """Load published files unchanged, LlamaGen's or MAR's.

        `gpt` and `vq`: LlamaGen's `c2i_*_{256,384}.pt` with `vq_ds16_c2i.pt`, or ds8; `image_size` in pixels, as the
        GPT was trained, by default what the published file name says. `mar` and `vae`: MAR's `checkpoint-last.pth` with
        `kl16.ckpt`; what comes back is a `MaskedClassToImagePipeline`. `num_heads` is needed only for sizes that were
        never published. Raises `VisarError`.
        """
        if mar is not None and vae is not None and gpt is None and vq is None:
            from visar.families.mar.loading import load_kl16, load_mar
            from visar.pipelines.masked import MaskedClassToImagePipeline

            if image_size is not None:
                raise VisarError("image_size is for a GPT; that of a MAR is in its weights.")
            found = load_mar(mar, num_heads=num_heads)
            c = found.config
            spec = match_mar(c.encoder_layers, c.decoder_layers, c.dim) or MAR_MODELS["mar-b"]
            return MaskedClassToImagePipeline(found, load_kl16(vae), spec.guidance, spec.guidance_schedule)
        if gpt is None or vq is None or mar is not None or vae is not None:
            raise VisarError("Give a GPT with its tokenizer (gpt, vq), or a MAR with its autoencoder (mar, vae).")
        tokenizer = load_vq(vq)
        model = load_gpt(gpt, grid=_grid(image_size, tokenizer.sizes.downsample), num_heads=num_heads)
        if model.config.condition != "class":
            raise VisarError(f"{gpt} is a text-conditional model; load it with TextToImagePipeline.")
        return cls(model, tokenizer)

    def __call__(
        self,
        class_labels: int | Sequence[int],
        *,
        sampler: str | AnySampler | None = None,
        window: int | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        guidance_interval: int = -1,
        guidance_schedule: str | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        first_image: int | Sequence[int] = 0,
        forced_tokens: Tensor | None = None,
        output_type: str = "pil",
        callback: StepCallback | None = None,
    ) -> ImageOutput:
        """Decode `num_images_per_prompt` images for each class id; the rest as in `TextToImagePipeline`."""
        labels = [class_labels] if isinstance(class_labels, int) else [index(label) for label in class_labels]
        classes = self.model.config.classes
        if not labels:
            raise VisarError("No class was given.")
        for label in labels:
            if not 0 <= label < classes:
                raise VisarError(f"Class {label} does not exist; this model knows 0 to {classes - 1}.")
        if num_images_per_prompt < 1:
            raise VisarError(f"num_images_per_prompt must be 1 or more, not {num_images_per_prompt}.")
        rows = [label for label in labels for _ in range(num_images_per_prompt)]
        return self._generate(
            torch.tensor(rows), None, rows,
            sampler=sampler, window=window, guidance_scale=guidance_scale, guidance_interval=guidance_interval,
            guidance_schedule=guidance_schedule, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
            first_image=first_image, forced_tokens=forced_tokens, output_type=output_type, callback=callback,
        )  # fmt: skip
