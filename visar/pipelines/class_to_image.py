"""From an ImageNet class to images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import Self

from visar.errors import VisarError
from visar.generation.output import ImageOutput
from visar.generation.progress import StepCallback
from visar.params import SamplingParams
from visar.pipelines.arguments import CALLBACK_INPUTS
from visar.pipelines.base import ImagePipeline


class ClassToImagePipeline(ImagePipeline):
    """Any model that is called with classes, such as LlamaGen's and MAR's of ImageNet."""

    condition: ClassVar[str] = "class"

    @classmethod
    def from_single_file(  # type: ignore[override]
        cls,
        gpt: str | Path | None = None,
        *,
        vq: str | Path | None = None,
        mar: str | Path | None = None,
        vae: str | Path | None = None,
        image_size: int | None = None,
        num_heads: int | None = None,
        ema: bool | None = None,
    ) -> Self:
        """Load published files unchanged, LlamaGen's or MAR's.

        `gpt` and `vq`: LlamaGen's `c2i_*_{256,384}.pt` with `vq_ds16_c2i.pt`, or ds8; `image_size` in pixels, as the
        GPT was trained, by default that of the published file name. `mar` and `vae`: MAR's `checkpoint-last.pth` with
        `kl16.ckpt`. `num_heads` is needed only for sizes that were never published; `ema` says whether averaged weights
        are taken, by default of a MAR only. Raises `VisarError`.
        """
        if (gpt is None) != (vq is None) or (mar is None) != (vae is None) or (gpt is None) == (mar is None):
            raise VisarError("Give a GPT with its tokenizer (gpt, vq), or a MAR with its autoencoder (mar, vae).")
        model = mar if gpt is None else gpt
        assert model is not None
        return cls._of_files(model, vq=vq, vae=vae, image_size=image_size, num_heads=num_heads, ema=ema)

    def __call__(
        self,
        class_labels: int | Sequence[int] | None = None,
        params: SamplingParams | None = None,
        *,
        sampler: Any = None,
        window: int | None = None,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        first_image: int | Sequence[int] = 0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: StepCallback | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = CALLBACK_INPUTS,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        **settings: Any,
    ) -> ImageOutput:
        """Decode `num_images_per_prompt` images for each class id. See `TextToImagePipeline` for the rest."""
        return self._generate(
            class_labels, num_images_per_prompt=num_images_per_prompt, params=params, generator=generator,
            height=height, width=width, callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs, callback=callback,
            num_inference_steps=num_inference_steps, sampler=sampler, return_dict=return_dict, settings=settings,
            window=window, first_image=first_image, output_type=output_type,
        )  # fmt: skip
