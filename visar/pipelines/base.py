"""What both pipelines share: loading and saving, one decoding call, images out of tokens."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor, nn
from typing_extensions import Self

from visar.drafters import KINDS, DraftModel
from visar.drafters.loading import kind_of, load_drafter
from visar.engine.graphs import Graph
from visar.engine.guidance import Guidance
from visar.engine.loop import Decoded, Snapshot, decode
from visar.engine.masked_session import MaskedSession
from visar.engine.quantization import NOT_SAVED, quantize, weights_of
from visar.engine.quantization import check as check_weights
from visar.engine.rng import Noise
from visar.engine.session import Session
from visar.errors import VisarError
from visar.families.llamagen.gpt import LlamaGen
from visar.families.llamagen.loading import load_part, quiet_conversion
from visar.families.llamagen.vq import VQModel
from visar.families.specs import resolve_model
from visar.files import replacing, writable_folder
from visar.host import has_bfloat16
from visar.pipelines.notebook import output_html
from visar.pipelines.preview import CodePreview
from visar.pipelines.progress import Progress, StepCallback, to_pil
from visar.pipelines.rows import noise_of
from visar.pipelines.sessions import Call, Sessions
from visar.samplers import (
    DEFAULTS,
    SAMPLERS,
    AnySampler,
    ContinuousTarget,
    Sampler,
    Target,
    check_sampler,
    get_sampler,
    samplers_for,
    values_of,
)
from visar.stats import DecodeStats

OUTPUT_TYPES = ("pil", "pt", "tokens")


@dataclass
class ImageOutput(BaseOutput):
    """`images`: PIL images, a tensor [B, 3, H, W] in [0, 1], or None, after `output_type`; `tokens` [B, N].

    Tokens of a masked model are [B, N, d]. `commit_pass` [B, N] is the pass that committed each token, -1 for those
    that were given to a masked model; `stats` says what the decoding cost.
    """

    images: list[Image.Image] | Tensor | None
    tokens: Tensor
    commit_pass: Tensor
    stats: DecodeStats

    def __repr__(self) -> str:
        return f"ImageOutput(tokens {list(self.tokens.shape)}, {self.stats})"

    def _repr_html_(self) -> str:
        images = to_pil(self.images) if isinstance(self.images, Tensor) else self.images or []
        return output_html(images, self.stats)


class ImagePipeline(DiffusionPipeline):
    """A GPT over image tokens and the tokenizer that turns them into pixels; the others are in `masked`."""

    gpt: LlamaGen
    vq: VQModel
    _folder: Path | None = None  # where it was loaded from, and its drafters may lie
    _drafters: Mapping[str, DraftModel] = MappingProxyType({})  # by kind
    token_kind: ClassVar[str] = "discrete"  # of the samplers that decode it
    component_classes: ClassVar[dict[str, Any]] = {}  # what a folder of this pipeline holds; filled in by subclasses

    @classmethod
    def from_pretrained(cls, name: str | Path, torch_dtype: torch.dtype | None = None, **_: Any) -> Self:
        """Load a model by name ("icons"), from a folder made by `save_pretrained`, or from a hub id.

        Raises `VisarError` for an unknown name, a missing or damaged file, and weights that are not finite.
        """
        folder = resolve_model(name)
        if isinstance(folder, str):
            parts_of_all = {part for k in (cls, *cls.__subclasses__()) for part in k.component_classes}
            folder = _download(folder, [*sorted(parts_of_all), *KINDS, "draft"])
        try:
            index = json.loads((folder / "model_index.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise VisarError(f"{folder} is not a saved pipeline: it has no readable model_index.json.") from error
        found = index.get("_class_name") if isinstance(index, dict) else None
        of = next((k for k in (cls, *cls.__subclasses__()) if k.__name__ == found), None)
        if of is None:
            raise VisarError(f"{folder} holds {f'a {found}' if found else 'no pipeline'}, not a {cls.__name__}.")
        parts: dict[str, Any] = {}
        for part, kind in of.component_classes.items():
            try:
                chosen = kind[index[part][1]] if isinstance(kind, dict) else kind
            except (TypeError, KeyError, IndexError) as error:
                raise VisarError(f"Could not load {part!r} from {folder}: {error!r} in model_index.json.") from error
            # An embedded model may use a part of another one.
            home = resolve_model(index["_parts_of"][part]) if part in index.get("_parts_of", {}) else folder
            parts[part] = load_part(chosen, Path(home) / part, repr(part))
        try:
            pipe = of(**parts, **{k: v for k, v in index.items() if not k.startswith("_") and k not in parts})
        except TypeError as error:
            raise VisarError(f"{folder} has settings that a {of.__name__} does not: {error}.") from error
        pipe._folder = folder
        return pipe.to(torch_dtype) if torch_dtype is not None else pipe

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert all parts, as in diffusers."""
        with quiet_conversion():
            return super().to(*args, **kwargs)

    def save_pretrained(  # type: ignore[override]
        self,
        folder: str | Path,
        dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
        parts_of: Mapping[str, str] = MappingProxyType({}),
        **_: Any,
    ) -> None:
        """Write a folder in diffusers layout: safetensors and configs per component, and model_index.json last.

        `dtypes` are those of the files, by part, by default what it has; they may be smaller than it could work in.
        `parts_of` names parts that are those of an embedded model, and are not written again.
        """
        if isinstance(self.model, LlamaGen) and weights_of(self.gpt) != "native":
            raise VisarError(NOT_SAVED)
        folder = writable_folder(folder)
        for part, module in self.stored_parts().items():
            if part in parts_of:
                continue
            if part in dtypes and isinstance(module, ModelMixin):
                module = nn.Module.to(copy.deepcopy(module), dtypes[part])
            module.save_pretrained(folder / part)
            config = json.loads((folder / part / "config.json").read_text())
            if config.pop("_name_or_path", None):  # where it was loaded from means nothing elsewhere
                with replacing(folder / part / "config.json") as temporary:
                    temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        with replacing(folder / "model_index.json") as temporary:
            index = json.loads(self.to_json_string()) | ({"_parts_of": dict(parts_of)} if parts_of else {})
            temporary.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def stored_parts(self) -> dict[str, Any]:
        """What a folder holds, by the names of its folders."""
        return {part: getattr(self, part) for part in self.component_classes}

    @property
    def model(self) -> Any:
        """The model that is decoded."""
        return self.gpt

    @property
    def grid(self) -> int:
        """Cells along one side of an image."""
        return self.config.grid or self.gpt.config.grid

    @property
    def pixels(self) -> int:
        """Pixels along one side of an image."""
        return self.grid * self.vq.sizes.downsample

    @torch.inference_mode()
    def decode_tokens(self, tokens: Tensor, batch: int = 16) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], fp32, for ids [B, grid**2]."""
        parts = [self.vq.decode(part.to(self.vq.device), self.grid).float() for part in tokens.split(batch)]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)

    @torch.inference_mode()
    def _generate(
        self,
        condition: Tensor,
        mask: Tensor | None,
        keys: Sequence[Hashable],
        *,
        sampler: str | AnySampler | None,
        window: int | None,
        guidance_scale: float | None,
        guidance_interval: int,
        guidance_schedule: str | None,
        temperature: float | None,
        top_k: int | None,
        top_p: float,
        seed: int,
        first_image: int | Sequence[int],
        forced_tokens: Tensor | None,
        output_type: str,
        callback: StepCallback | None,
    ) -> ImageOutput:
        """Decode one row per key. Equal keys get successive image indices: an image depends on key and index alone."""
        checked_output(output_type)
        if guidance_schedule not in (None, "constant"):
            raise VisarError("guidance_schedule is for masked models; guidance of this one is constant.")
        method = self.fitted(self.sampler_of(DEFAULTS["discrete"] if sampler is None else sampler, window))
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        if not math.isfinite(scale):
            raise VisarError(f"guidance_scale must be a finite number, not {scale}.")
        temperature = 1.0 if temperature is None else temperature
        target = Target(temperature, self.config.top_k if top_k is None else top_k, top_p, forced_tokens)
        model = self._drafter_for(method)
        call = Call(
            self.gpt, model, condition, mask, method, target, Guidance(scale, guidance_interval), self.grid,
            self.vq.quantize.embedding.weight,
        )  # fmt: skip
        # A bar alone need not make a GPU wait after every pass.
        every = None if callback is None else 1
        noise = noise_of(keys, first_image, seed, self.gpt.device)
        session, result = self._sessions.run(
            call, lambda session, graph: self._decoded(
                session, method, target, noise, callback, None, every, graph
            ),
        )  # fmt: skip
        images = self._images(result.tokens, output_type)
        done = (result.commit_pass.amax(1) + 1).tolist()
        weights = sum(p.numel() * p.element_size() for p in self.gpt.parameters())
        weights -= self.gpt.tok_embeddings.weight.numel() * self.gpt.tok_embeddings.weight.element_size()
        draft_seconds: float | None = session.drafter.seconds if session.drafter is not None else 0.0
        if session.drafter is not None and result.replays:
            draft_seconds = None  # what happens within a graph cannot be timed
        stats = DecodeStats(
            sampler=method.name,
            parameters=values_of(method),
            exact=method.exact,
            law=SAMPLERS[method.name].exactness if method.name in SAMPLERS else "exact" if method.exact else "relaxed",
            seed=seed,
            settings={
                "guidance_scale": scale,
                "guidance_interval": guidance_interval,
                "temperature": temperature,
                "top_k": target.top_k,
                "top_p": top_p,
                "dtype": str(self.gpt.dtype).removeprefix("torch."),
                "weights": weights_of(self.gpt),  # other than native ones make another model, which is the target
                "device": str(session.device),
            },
            images=session.batch,
            tokens=session.length,
            nfe=result.passes + session.prefill_passes,
            passes_per_image=done,
            commits_per_pass=sum(session.length / n for n in done) / len(done),
            seconds=result.seconds,
            draft_seconds=draft_seconds,
            ms_per_pass=1000 * result.seconds / result.passes,
            gigabytes=(weights * result.passes + result.bytes_read) / 1e9,
            graph_passes=result.replays,
            capture_seconds=result.capture_seconds,
        )
        return ImageOutput(images=images, tokens=result.tokens, commit_pass=result.commit_pass, stats=stats)

    def _decoded(
        self,
        session: Session | MaskedSession,
        method: Any,
        target: Target | ContinuousTarget,
        noise: Noise,
        callback: StepCallback | None,
        given: Tensor | None,
        every: int | None,
        graph: Graph | None = None,
    ) -> Decoded:
        """Run the sampler under the progress bar; `given` [N] marks tokens that no pass commits."""

        def tell(now: Snapshot) -> None:
            bar.update(int(now.lengths.sum()) - bar.n)
            if callback is not None:
                callback(Progress.of(now, given, self.glimpse, self.decode_tokens))

        quiet = getattr(self, "_progress_bar_config", {}).get("disable", False)
        with self.progress_bar(total=session.batch * session.length) as bar:
            done = decode(session, method, target, noise, None if quiet and callback is None else tell, every, graph)
            bar.update(bar.total - bar.n)  # the last passes may be told to nobody
            return done

    def _images(self, tokens: Tensor, output_type: str) -> list[Image.Image] | Tensor | None:
        """What `output_type` asks for."""
        if output_type == "tokens":
            return None
        pixels = self.decode_tokens(tokens)
        return pixels if output_type == "pt" else to_pil(pixels)

    def sampler_of(self, sampler: str | AnySampler, window: int | None = None) -> Any:
        """The sampler that is meant, with another window if one is given; a `VisarError` if it is of another family."""
        check_sampler(sampler if not isinstance(sampler, str) else get_sampler(sampler), self.token_kind)
        return get_sampler(sampler, window=window)

    def fitted(self, sampler: Any) -> Any:
        """The sampler with the cells in a row of this model's images, where it asks for them."""
        if values_of(sampler).get("grid") == 0:
            return get_sampler(sampler, grid=self.grid)
        return sampler

    @property
    def fastest_dtype(self) -> torch.dtype:
        """What decoding is fastest in on the device that the model is on; the command line's default."""
        fast = self.device.type != "cpu" or has_bfloat16()
        return torch.bfloat16 if fast else torch.float32

    def quantize(self, weights: str) -> None:
        """Round the weights to "int8" or "fp8", on the device where they will be used; "native" leaves them.

        What is decoded is then another model, and samplers are exact for that one: `docs/quantization.md` has what it
        costs. It cannot be saved, trained or rounded again. Raises `VisarError` where it cannot be done.
        """
        check_weights(weights, self.model.device)
        if not isinstance(self.model, LlamaGen):
            if weights != "native":
                raise VisarError("Weights are rounded to 8 bits of a GPT over image tokens alone, not of a MAR.")
            return
        now = weights_of(self.gpt)
        if now not in ("native", weights):
            raise VisarError(f"The weights are {now} already; load the model anew for {weights}.")
        if now != weights:
            quantize(self.gpt, weights)

    def load_drafter(self, path: str | Path) -> None:
        """Give the model a drafter for the samplers that need one (see `visar.drafters.loading.load_drafter`)."""
        model = load_drafter(path, self.gpt, self.grid)
        self._drafters = {**self._drafters, kind_of(model): model}

    def usable_samplers(self) -> list[str]:
        """Names of the samplers that decode it as it is: those that need no drafter, or one that is there."""
        return [
            name
            for name, spec in samplers_for(self.token_kind).items()
            if not spec.drafter or self._has_drafter(spec.drafter)
        ]

    def _has_drafter(self, kind: str) -> bool:
        return kind in self._drafters or self._beside(kind) is not None

    def _beside(self, kind: str) -> Path | None:
        """The folder of such a drafter within the model's own, if there is one."""
        return self._folder / kind if self._folder is not None and (self._folder / kind).is_dir() else None

    def _drafter_for(self, method: Sampler) -> DraftModel | None:
        """The drafter that a sampler needs: one that was loaded, or one that lies beside the model."""
        kind = getattr(method, "drafter", None)
        if kind is None:
            return None
        if kind not in self._drafters and (folder := self._beside(kind)) is not None:
            self.load_drafter(folder)
        if kind not in self._drafters:
            what = "a smaller model" if kind == "model" else f"a drafter of the kind {kind!r}"
            raise VisarError(f"Sampler {method.name!r} needs {what}; give it with load_drafter, or --drafter PATH.")
        return self._drafters[kind]

    @property
    def _sessions(self) -> Sessions:
        """Those that are kept between calls."""
        if "_kept_sessions" not in vars(self):
            self._kept_sessions = Sessions()
        return self._kept_sessions

    def glimpse(self, tokens: Tensor) -> Tensor:
        """One colour per token, [B, 3, grid, grid] in [0, 1], for tokens [B, grid**2]; cheaper than the images."""
        if not hasattr(self, "_code_preview"):
            self._code_preview = CodePreview.fit(self.vq)
        return self._code_preview(tokens, self.grid)


def checked_output(output_type: str) -> None:
    """A `VisarError` for a kind of output that there is not."""
    if output_type not in OUTPUT_TYPES:
        raise VisarError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {output_type!r}.")


def _download(hub_id: str, parts: list[str]) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        hf_hub_download(hub_id, "model_index.json")  # before gigabytes of a repository that holds no pipeline
        return Path(snapshot_download(hub_id, allow_patterns=["model_index.json", *(f"{p}/*" for p in parts)]))
    except Exception as error:
        raise VisarError(f"Could not download {hub_id!r} from the hub: {type(error).__name__}.") from error
