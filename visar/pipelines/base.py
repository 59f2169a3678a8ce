"""Pipelines with diffusers' API over `ImageModel`, which is independent of diffusers.

Arguments of diffusers work, or raise a `VisarError` that says what to use instead.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from typing_extensions import Self

from visar.errors import VisarError, unknown
from visar.families.registry import family_of, family_of_components
from visar.families.source import HubOptions, check_condition, open_source
from visar.generation.model import ImageModel
from visar.generation.output import ImageOutput
from visar.generation.progress import StepCallback
from visar.generation.rows import listed
from visar.generation.saving import save
from visar.params import SamplingParams, whole
from visar.pipelines.arguments import device_from, dtype_of, seeds_of, step_callback, with_steps

CALL = ("sampler", "window", "num_images_per_prompt", "generator", "output_type", "callback", "callback_on_step_end",
        "return_dict", "height", "width", "num_inference_steps")  # fmt: skip
LOADING = ("torch_dtype", "dtype", "device_map", "revision", "variant", "cache_dir", "token", "local_files_only",
           "subfolder")  # fmt: skip
FILES = ("vq", "vae", "text_encoder", "image_size", "num_heads", "ema")  # arguments for published files


class Origin(NamedTuple):
    """Settings, folder and drafters of a pipeline, for another one made of its components."""

    settings: Mapping[str, Any]
    folder: Path | None
    drafters: Mapping[str, Any]


def _refusal(sentence: str) -> Any:
    """A method that raises `VisarError` with the `sentence`."""

    def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise VisarError(sentence)

    return refuse


_ORIGINS: weakref.WeakKeyDictionary[Any, Origin] = weakref.WeakKeyDictionary()  # by the component that decodes


class ImagePipeline(DiffusionPipeline):
    """The base of both pipelines, over `image_model`; the components are its family's."""

    image_model: ImageModel
    condition: ClassVar[str]  # "prompt" or "class"
    model_cpu_offload_seq = None

    def __init__(self, **components: Any):
        """The `components` of a family by name (`pipe.components`), and its settings, such as `guidance_scale`.

        Missing settings, and drafters, are those of the pipeline that the components came from.
        """
        super().__init__()
        model = components.pop("image_model", None)
        if model is None:
            model = _assembled(components)
        self._take(model)

    def _take(self, model: ImageModel) -> None:
        family = model.family
        name = "This model" if model.folder is None else str(model.folder)
        check_condition(name, family.condition, self.condition)
        object.__setattr__(self, "image_model", model)
        self.register_modules(**family.components)
        self.register_to_config(**family.settings, _family=family.name)
        _ORIGINS[family.model] = Origin(family.settings, model.folder, model.drafters.loaded)

    def __setattr__(self, name: str, value: Any) -> None:
        model = vars(self).get("image_model")
        if model is not None and name in model.family.components and model.family.components[name] is not value:
            model.family.replace(name, value)
        super().__setattr__(name, value)

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of tqdm, such as `disable=True`."""
        super().set_progress_bar_config(**options)
        self.image_model.bar = options

    # Loading and saving

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:  # type: ignore[override]
        """Load a model by name ("icons"), from a folder made by `save_pretrained`, or from a hub id.

        As in diffusers: `dtype` or `torch_dtype`, `device_map` (a device), `revision`, `variant`, `subfolder`,
        `cache_dir`, `token` and `local_files_only`, and components by name that replace those of the folder. Raises
        `VisarError` for an unknown name or keyword, a missing or damaged file, and weights that are not finite.
        """
        return cls.opened(pretrained_model_name_or_path, {}, options)

    @classmethod
    def _of_files(cls, model: str | Path, **files: Any) -> Self:
        return cls.opened(model, files, {})

    @classmethod
    def opened(
        cls,
        name: str | Path,
        files: Mapping[str, Any],
        options: dict[str, Any],
        kinds: Mapping[str, type[ImagePipeline]] = MappingProxyType({}),
    ) -> Any:
        """A pipeline of `name` with its `files`, of this class or of the one in `kinds` for its kind of conditions."""
        loading = {key: options.pop(key) for key in LOADING if key in options}
        hub = {key: loading[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in loading}
        source = open_source(
            name, **files, subfolder=loading.get("subfolder"), variant=loading.get("variant"), hub=HubOptions(**hub),
            given=options, condition=getattr(cls, "condition", None),
        )  # fmt: skip
        if source.variant is not None:
            raise VisarError(f"Files of the variant {source.variant!r} are not read; leave it out, and give dtype=.")
        family = family_of(source)
        parts = family.required | family.optional
        for key in options:
            if key not in parts or source.files:
                raise unknown("keyword", key, [*LOADING, *(FILES if source.files else sorted(parts))])
        device, dtype = device_from(loading.get("device_map")), dtype_of(loading)
        model = ImageModel(family.load(source), source.folder)
        pipe = kinds.get(model.family.condition, cls)(image_model=model)
        given = [value for value in (device, dtype) if value is not None]
        return pipe.to(*given) if given else pipe

    @classmethod
    def from_pipe(cls, pipeline: Any, **changes: Any) -> Self:  # type: ignore[override]
        """A pipeline of the same components, settings and drafters; `changes` replace components or settings."""
        if set(changes) & {"dtype", "torch_dtype"}:
            raise VisarError("Both pipelines have the same components, so they have one dtype; use .to(dtype).")
        model = ImageModel.of(pipeline)
        return cls(**{**model.family.components, **model.family.settings, **changes})

    @property
    def components(self) -> dict[str, Any]:
        return dict(self.image_model.family.components)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert all components, as in diffusers."""
        kwargs.pop("silence_dtype_warnings", None)
        self.image_model.to(*args, **kwargs)
        return self

    @property
    def device(self) -> torch.device:
        return self.image_model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.image_model.dtype

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
        parts_of: Mapping[str, str] = MappingProxyType({}),
        **hub: Any,
    ) -> None:
        """Write a folder in diffusers' layout: safetensors and configs per component, and model_index.json last.

        `dtypes` are those of the files by component, by default the component's; they may be smaller than it can run
        in. `parts_of` maps components shared with an embedded model, which are not written, to its name. `push_to_hub`
        then uploads the folder to `repo_id`; `hub` are options of huggingface_hub (token, private, ...). Raises
        `VisarError` for pickled weights, variants and shards.
        """
        if not safe_serialization:
            raise VisarError("Weights are written as safetensors only; leave safe_serialization=True.")
        if variant is not None:
            raise VisarError("Variants of files are not written; give `dtypes`, or save to a folder of its own.")
        if max_shard_size is not None:
            raise VisarError("Weights are written as one file for each component; leave max_shard_size out.")
        if push_to_hub != (repo_id is not None):
            raise VisarError(
                "push_to_hub needs repo_id, the name of the repository, and repo_id needs push_to_hub=True."
            )
        if hub and not push_to_hub:
            raise unknown("keyword", next(iter(hub)), ("dtypes", "parts_of", "push_to_hub", "repo_id"))
        save(self.image_model, save_directory, dtypes, parts_of)
        if push_to_hub:
            from huggingface_hub import HfApi

            private, token = hub.pop("private", None), hub.pop("token", None)
            api = HfApi(token=token)
            name = api.create_repo(str(repo_id), private=private, exist_ok=True).repo_id
            api.upload_folder(repo_id=name, folder_path=save_directory, **hub)

    # What is refused by name

    enable_model_cpu_offload = enable_sequential_cpu_offload = enable_group_offload = _refusal(
        "visar keeps the weights on one device while it decodes; move the pipeline with .to(device), or make it "
        'smaller with quantize("int8").'
    )
    enable_attention_slicing = enable_xformers_memory_efficient_attention = _refusal(
        "visar chooses its own attention kernels; decode fewer images at once if memory is short."
    )
    load_lora_weights = load_ip_adapter = load_textual_inversion = _refusal(
        "Adapters are not loaded; merge them into the model's weights first, and give that model as a component."
    )

    # What is asked of the model

    def load_drafter(self, path: str | Path) -> None:
        """Give the model a drafter for the samplers that need one: a folder, or a released file."""
        self.image_model.load_drafter(path)

    def usable_samplers(self) -> list[str]:
        """Names of the samplers that need no drafter, or one that the model has."""
        return self.image_model.usable_samplers()

    def quantize(self, weights: str) -> None:
        """Round the weights to "int8" or "fp8": see `ImageModel.quantize`."""
        self.image_model.quantize(weights)

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], fp32, for tokens [B, N]."""
        return self.image_model.decode_tokens(tokens)

    def _generate(
        self,
        conditions: Any,
        *,
        num_images_per_prompt: Any,
        params: SamplingParams | None,
        generator: Any,
        height: int | None,
        width: int | None,
        callback_on_step_end: Callable[..., Any] | None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None,
        callback: StepCallback | None,
        num_inference_steps: int | None,
        sampler: Any,
        return_dict: bool,
        settings: dict[str, Any],
        **options: Any,
    ) -> Any:
        """Translate a call with diffusers' arguments to one of the model."""
        model = self.image_model.sized(whole("height", height), whole("width", width))
        sampler = with_steps(model, sampler, num_inference_steps)
        if conditions is None:
            raise VisarError(f"No {self.condition} was given.")
        conditions = listed(conditions)
        count = whole("num_images_per_prompt", num_images_per_prompt)
        count = 1 if count is None else count
        if params is not None:
            params = SamplingParams.of(params)
        for name in settings:
            if name not in SamplingParams.__dataclass_fields__:
                raise unknown("keyword", name, [*SamplingParams.__dataclass_fields__, *CALL])
        if generator is not None:
            if settings.get("seed") is not None or (params and params.seed not in (None, SamplingParams.seed)):
                raise VisarError("Give a seed or a generator, not both.")
            settings["seed"] = seeds_of(generator, count * len(conditions))
        if callback_on_step_end is not None:
            if callback is not None:
                raise VisarError("Give callback or callback_on_step_end, not both.")
            callback = step_callback(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        if "seed" in settings and settings["seed"] is None:
            settings.pop("seed")
            params = replace(params or SamplingParams(), seed=None)
        out = model.generate(
            conditions, params, sampler=sampler, num_images=count, callback=callback, **options, **settings
        )
        return out if return_dict else out.to_tuple()


def _assembled(components: dict[str, Any]) -> ImageModel:
    """The model of components, which may be those of another pipeline."""
    modules = {name: value for name, value in components.items() if hasattr(value, "state_dict")}
    settings = {name: value for name, value in components.items() if name not in modules}
    family = family_of_components(modules)
    for name in settings:
        if name not in family.setting_names:
            raise unknown("keyword", name, [*sorted(family.required | family.optional), *family.setting_names])
    origin = next((_ORIGINS[m] for m in modules.values() if m in _ORIGINS), None)
    if origin is None:
        return ImageModel(family.of(modules, settings))
    made = ImageModel(family.of(modules, {**origin.settings, **settings}), origin.folder)
    made.drafters.loaded = dict(origin.drafters)
    return made


__all__ = ["ImageOutput", "ImagePipeline"]
