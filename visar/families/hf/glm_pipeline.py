"""The two ways in which GLM-Image's codes meet `GlmImagePipeline` of diffusers, which makes pixels of them.

`GlmPixels` runs the pipeline on codes that visar has decoded; `FasterGlmImagePipeline` is the pipeline, called as ever,
with its codes from visar.
"""

from __future__ import annotations

import inspect
import threading
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visar.errors import VisarError
from visar.families.hf.loading import unreadable
from visar.params import is_list, whole

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")  # of pixels, by their folders
ARGUMENTS: dict[str, Any] = {}  # of the pipeline's call for pixels, where they are not its defaults


class GlmPixels:
    """Pixels of codes, by a loaded `pipeline`, or by that of a `folder`, which is loaded when it is needed.

    Text in quotation marks in a prompt is given to the pipeline's glyph encoder. The noise of an image follows from its
    codes, so an image is a function of prompt and codes, in any batch. `arguments` are those of the pipeline's call.
    Threads take turns, as a pipeline's scheduler counts the steps of one call.
    """

    def __init__(self, pipeline: Any = None, folder: Path | None = None):
        self.pipeline, self.folder = pipeline, folder
        self.arguments = dict(ARGUMENTS)
        self._turn = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_turn"}  # no lock can be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _turn=threading.Lock())

    def check(self) -> None:
        """Raise `VisarError` where there is nothing to make pixels with."""
        if self.pipeline is not None:
            return
        lacking = [name for name in PARTS if self.folder is None or not (self.folder / name).is_dir()]
        if lacking:
            raise VisarError(
                f"This GLM-Image has no {lacking[0]} to make pixels with: ask for its tokens "
                '(output_type="latent"), or give the whole folder of zai-org/GLM-Image.'
            )

    @torch.no_grad()
    def __call__(self, family: Any, prompts: Sequence[str], tokens: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], fp32, of the family's tokens [B, N]."""
        self.check()
        with self._turn:
            return self._made(family, prompts, tokens)

    def _made(self, family: Any, prompts: Sequence[str], tokens: Tensor) -> Tensor:
        pipeline, (height, width) = self._loaded(family), family.pixels
        images = []
        for text, row, ids in zip(prompts, tokens.cpu(), family.prior_token_ids(tokens), strict=True):
            seed = zlib.crc32(row.contiguous().numpy().tobytes())
            (image,) = pipeline(
                prompt=[text], prior_token_ids=ids[None].to(family.device), height=height, width=width,
                generator=torch.Generator().manual_seed(seed), output_type="pt", **self.arguments,
            ).images  # fmt: skip
            images.append(image.float())
        return torch.stack(images)

    def _loaded(self, family: Any) -> Any:
        """The pipeline, on the device of the family and in its dtype; a caller's own stays as it is."""
        if self.folder is None:
            return self.pipeline
        if self.pipeline is None:
            try:
                from diffusers import GlmImagePipeline

                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)  # of the argument's name, which older versions need
                    self.pipeline = GlmImagePipeline.from_pretrained(
                        self.folder, vision_language_encoder=None, processor=None,  # which made the codes
                        torch_dtype=family.dtype, local_files_only=True, use_safetensors=True,
                    )  # fmt: skip
            except Exception as error:  # of several libraries, on files that are missing, cut or changed
                raise unreadable("the parts that make pixels", self.folder, error) from error
            self.pipeline.set_progress_bar_config(disable=True)
        for name in ("transformer", "vae", "text_encoder"):
            part = getattr(self.pipeline, name)
            if (part.device, part.dtype) != (family.device, family.dtype):
                part.to(family.device, family.dtype)
        return self.pipeline


class FasterGlmImagePipeline:
    """A `GlmImagePipeline` of diffusers with codes from visar: one image of codes for each image and each seed.

    It is called as the `pipeline` is, and gives what that gives. `prior` is visar's pipeline of the codes, whose
    `sampler`, `window`, `temperature`, `top_k` and `top_p` are keywords here too; `stats` are those of its last run.
    """

    KEYWORDS = ("sampler", "window", "temperature", "top_k", "top_p")

    def __init__(self, pipeline: Any, prior: Any):
        self.pipeline, self.prior = pipeline, prior
        self.stats: Any = None
        prior.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """As `GlmImagePipeline`. Raises `VisarError` for a size off the grid, and for images to start from."""
        own = {name: keywords.pop(name) for name in self.KEYWORDS if name in keywords}
        try:
            given = dict(inspect.signature(self.pipeline.__call__).bind(*args, **keywords).arguments)
        except TypeError as error:
            raise VisarError(f"GlmImagePipeline cannot be called so: {error}.") from error
        if given.get("image") is not None:
            raise VisarError("visar makes images of prompts; for those of other images call the stock pipeline.")
        family = self.prior.image_model.sized(given.get("height"), given.get("width")).family
        given["height"], given["width"] = family.pixels
        if given.get("prior_token_ids") is not None:
            if own:
                raise VisarError(f"prior_token_ids are given, so {next(iter(own))} has no meaning.")
            return self.pipeline(**given)
        if (prompt := given.get("prompt")) is None:
            raise VisarError("Give a prompt, or prior_token_ids.")
        count = whole("num_images_per_prompt", given.pop("num_images_per_prompt", 1))
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        ids = self.prior_token_ids(
            prompts, *family.pixels, num_images_per_prompt=count, generator=given.get("generator"), **own
        )
        each = [text for text in prompts for _ in range(len(ids) // len(prompts))]
        return self.pipeline(**given | {"prompt": each, "prior_token_ids": ids})

    def prior_token_ids(
        self, prompt: Any, height: int | None = None, width: int | None = None, *, num_images_per_prompt: Any = 1,
        generator: Any = None, **own: Any,
    ) -> Tensor:  # fmt: skip
        """The codes of images, prompt by prompt, as the pipeline's argument `prior_token_ids`, [B, 4HW].

        A generator's own seed is taken, and numbers the images of each prompt, and a list has one for each image.
        """
        model = self.prior.image_model.sized(height, width)
        out = self.prior(
            prompt, height=height, width=width, num_images_per_prompt=num_images_per_prompt,
            seed=_seeds(generator), output_type="tokens", **own,
        )  # fmt: skip
        self.stats = out.stats
        found: Tensor = model.family.prior_token_ids(out.tokens).to(self.pipeline.transformer.device)
        return found


def faster_pipeline(pipeline: Any, prior: Any) -> FasterGlmImagePipeline:
    """The pipeline with codes from visar's pipeline `prior`."""
    return FasterGlmImagePipeline(pipeline, prior)


def _seeds(generator: Any) -> int | list[int] | None:
    """The seeds that generators were made with: their state, which makes the noise of pixels, stays as it is."""
    if generator is None:
        return None
    every = list(generator) if is_list(generator) else [generator]
    for one in every:
        if not isinstance(one, torch.Generator):
            raise VisarError(f"generator must be a torch.Generator, not a {type(one).__name__}.")
    seeds = [one.initial_seed() for one in every]
    return seeds if is_list(generator) else seeds[0]
