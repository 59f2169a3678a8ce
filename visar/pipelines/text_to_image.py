"""From a prompt to images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import Self

from visar.errors import VisarError
from visar.generation.output import ImageOutput
from visar.generation.progress import StepCallback
from visar.generation.rows import listed
from visar.params import SamplingParams
from visar.pipelines.arguments import CALLBACK_INPUTS
from visar.pipelines.base import ImagePipeline


class TextToImagePipeline(ImagePipeline):
    """Any model that is called with prompts, such as the embedded `icons` and `icons-mar`.

    ```python
    from visar import TextToImagePipeline

    pipe = TextToImagePipeline.from_pretrained("icons")
    out = pipe("a red heart, 3d", sampler="scd", seed=0)
    out.images[0].save("heart.png")
    print(out.stats)
    ```
    """

    condition: ClassVar[str] = "prompt"

    @classmethod
    def from_single_file(  # type: ignore[override]
        cls,
        gpt: str | Path,
        *,
        vq: str | Path,
        text_encoder: str | Path = "google/flan-t5-xl",
        image_size: int | None = None,
        num_heads: int | None = None,
        ema: bool | None = None,
    ) -> Self:
        """Load LlamaGen's published files unchanged.

        `gpt`: `t2i_XL_stage1_256.pt` or `t2i_XL_stage2_512.pt`; `vq`: `vq_ds16_t2i.pt`; `text_encoder`: a folder or
        hub id of FLAN-T5-XL; `image_size` in pixels, as the GPT was trained, by default that of the published file
        name; `num_heads` is needed only for sizes that were never published; `ema` takes averaged weights. Raises
        `VisarError`.
        """
        return cls._of_files(gpt, vq=vq, text_encoder=text_encoder, image_size=image_size, num_heads=num_heads, ema=ema)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        params: SamplingParams | None = None,
        *,
        sampler: Any = None,
        window: int | None = None,
        num_images_per_prompt: int = 1,
        negative_prompt: Any = None,
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
        """Decode `num_images_per_prompt` images for each prompt, prompt by prompt.

        `params` or the same names as keywords (`SamplingParams`: seed, guidance_scale, temperature, top_k, top_p, ...)
        say how; `sampler` is a name of `visar samplers`, FILE.py:NAME, or an object, and `window` replaces its W. The
        same seed and prompt give the same image in any batch; `seed=None` takes a random one, which the stats report. A
        `generator` samples the seed; a list of seeds or generators has one for each image. A prompt's images have the
        indices `first_image`, `first_image` + 1, ..., or one for each image. `callback` gets a `Progress` after every
        pass, `callback_on_step_end` the arguments of diffusers. `num_inference_steps` is for samplers of continuous
        tokens. Raises `VisarError` for values that are out of range or unknown.
        """
        texts = listed(negative_prompt)
        if any(text not in (None, "") for text in texts):
            raise VisarError(
                "negative_prompt has no meaning for this model, whose unconditional batch has no text; use "
                "guidance_scale."
            )
        return self._generate(
            prompt, num_images_per_prompt=num_images_per_prompt, params=params, generator=generator, height=height,
            width=width, callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs, callback=callback,
            num_inference_steps=num_inference_steps, sampler=sampler, return_dict=return_dict, settings=settings,
            window=window, first_image=first_image, output_type=output_type,
        )  # fmt: skip
