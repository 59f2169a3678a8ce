"""From a prompt to pictures."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Self

from visar.errors import VisarError
from visar.models.llamagen import LlamaGen
from visar.models.loading import load_gpt, load_vq
from visar.models.specs import MODELS
from visar.models.t5 import T5CaptionEncoder
from visar.models.vq import VQModel
from visar.models.words import WordEncoder
from visar.pipelines.base import ImageOutput, ImagePipeline
from visar.pipelines.progress import StepCallback
from visar.samplers import AnySampler


class TextToImagePipeline(ImagePipeline):
    """LlamaGen's text-conditional model, or the embedded `icons` model of the same architecture.

    ```python
    from visar import TextToImagePipeline

    pipe = TextToImagePipeline.from_pretrained("icons")
    out = pipe("a red heart, 3d", sampler="scd", seed=0)
    out.images[0].save("heart.png")
    print(out.stats)
    ```
    """

    component_classes: ClassVar[dict[str, Any]] = {
        "gpt": LlamaGen,
        "vq": VQModel,
        "text_encoder": {"WordEncoder": WordEncoder, "T5CaptionEncoder": T5CaptionEncoder},
    }

    def __init__(
        self,
        gpt: LlamaGen,
        vq: VQModel,
        text_encoder: WordEncoder | T5CaptionEncoder,
        grid: int | None = None,
        guidance_scale: float = MODELS["llamagen-t2i-xl"].guidance,
        top_k: int = MODELS["llamagen-t2i-xl"].top_k,
    ):
        super().__init__()
        self.register_modules(gpt=gpt, vq=vq, text_encoder=text_encoder)
        self.register_to_config(grid=grid, guidance_scale=guidance_scale, top_k=top_k)

    @classmethod
    def from_single_file(
        cls,
        gpt: str | Path,
        *,
        vq: str | Path,
        text_encoder: str | Path = "google/flan-t5-xl",
        image_size: int | None = None,
        num_heads: int | None = None,
    ) -> Self:
        """Load LlamaGen's published files unchanged.

        `gpt`: `t2i_XL_stage1_256.pt` or `t2i_XL_stage2_512.pt`; `vq`: `vq_ds16_t2i.pt`; `text_encoder`: a folder or
        hub id of FLAN-T5-XL; `image_size` in pixels, as the GPT was trained, by default what the published file name
        says; `num_heads` is needed only for sizes that were never published. Raises `VisarError`.
        """
        tokenizer = load_vq(vq)
        model = load_gpt(gpt, grid=_grid(image_size, tokenizer.sizes.downsample), num_heads=num_heads)
        if model.config.condition != "text":
            raise VisarError(f"{gpt} is a class-conditional model; load it with ClassToImagePipeline.")
        c = model.config
        encoder = T5CaptionEncoder.from_pretrained(text_encoder, length=c.condition_length)
        if encoder.encoder.config.d_model != c.caption_features:
            raise VisarError(
                f"The text encoder {text_encoder} has features of {encoder.encoder.config.d_model}, "
                f"but {gpt} was trained on features of {c.caption_features}."
            )
        return cls(model, tokenizer, encoder)

    def __call__(
        self,
        prompt: str | Sequence[str],
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
        """Decode `num_images_per_prompt` pictures for each prompt, prompt by prompt.

        `sampler`: a name of `visar.samplers.SAMPLERS`, or of `CONTINUOUS` for a masked model, or a configured object;
        `window` replaces its W. `guidance_scale`, `top_k` and `temperature` default to the model's own;
        `guidance_interval` >= 0 ends guidance after that position, `guidance_schedule` is "linear" or "constant" over
        a masked model's decisions. `callback` gets a `Progress` after every pass. One seed and prompt give the same
        picture whatever else is in the call. `forced_tokens` [grid**2], long, keeps its non-negative entries in place
        and has the rest decoded around them; for a masked model it is [grid**2, d] with NaN for the rest.
        A prompt's pictures have the indices `first_image`, `first_image` + 1, ..., or those that it gives for each
        picture: a large set can be made in parts.
        Raises `VisarError` for an empty prompt or a value out of range.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or any(not isinstance(p, str) or not p.strip() for p in prompts):
            raise VisarError("The prompt is empty; give at least one word.")
        if num_images_per_prompt < 1:
            raise VisarError(f"num_images_per_prompt must be 1 or more, not {num_images_per_prompt}.")
        features, mask = self.text_encoder.encode(prompts)
        if isinstance(self.text_encoder, WordEncoder):
            for note in self.text_encoder.notes(prompts):
                warnings.warn(note, stacklevel=2)
        each = num_images_per_prompt
        return self._generate(
            features.repeat_interleave(each, 0), mask.repeat_interleave(each, 0),
            [p for p in prompts for _ in range(each)],
            sampler=sampler, window=window, guidance_scale=guidance_scale, guidance_interval=guidance_interval,
            guidance_schedule=guidance_schedule, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
            first_image=first_image, forced_tokens=forced_tokens, output_type=output_type, callback=callback,
        )  # fmt: skip


def _grid(image_size: int | None, downsample: int) -> int | None:
    if image_size is None:
        return None
    if image_size < downsample or image_size % downsample:
        raise VisarError(f"image_size must be a multiple of {downsample} pixels, not {image_size}.")
    return image_size // downsample
