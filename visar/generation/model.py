"""`ImageModel`: a loaded family with its drafters and cached sessions, and one call for prompts or classes.

The pipelines wrap it in diffusers' API; command line, demo, bulk runs and evaluation use it directly.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from inspect import signature
from operator import index
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from typing_extensions import Self

from visar.devices import placement
from visar.dtypes import COMPUTED, WHOLE, has_values
from visar.engine.finite import require_finite, require_finite_weights
from visar.engine.graphs import Graph, RowGraphs
from visar.engine.loop import Decoded, Snapshot, decode
from visar.engine.memory import check_memory
from visar.errors import NotInTraining, VisarError, unknown
from visar.families.base import DiscreteFamily, Encoded, Family
from visar.families.registry import family_of
from visar.families.source import Source, check_condition, open_source
from visar.families.wrapped import check_filled, check_one_dtype, check_unwrapped
from visar.generation import continuous, discrete
from visar.generation.drafting import Drafters
from visar.generation.output import ImageOutput, as_output, checked_output
from visar.generation.progress import Progress, StepCallback, check_callback
from visar.generation.rows import listed, noise_of
from visar.generation.sessions import Sessions
from visar.kernels.backend import triton
from visar.kernels.derived import steady_weights
from visar.kernels.invariant import invariant
from visar.params import DISCRETE, SamplingParams, of_64_bits, plain
from visar.samplers import SamplerSpec, check_sampler, default_sampler, get_sampler, samplers_for

LEAST = 2**12  # bytes of a row, of families that do not say how many it needs
COPIES = 4  # of the pixels in fp32, while the images of a call are put together
RUN = {"discrete": discrete.run, "continuous": continuous.run}


class ImageModel:
    """A loaded `family`, ready to generate.

    ```python
    import visar

    model = visar.ImageModel.load("icons")
    out = model.generate(["a red heart, 3d"], sampler="scd", seed=0)
    ```
    """

    def __init__(self, family: Family, folder: Path | None = None):
        self.family = family
        self.folder = folder  # of the model, where its drafters may be
        self.drafters = Drafters(family, folder)
        self.sessions = Sessions()
        self.bar: dict[str, Any] = {}  # options of tqdm; {"disable": True} shows no bar
        self._row_graphs: RowGraphs | None = None

    @classmethod
    def load(cls, name: str | Path | Source, **options: Any) -> Self:
        """The model of a name of `visar models`, a folder, a hub id or a file; `options` are those of `open_source`.

        Raises `VisarError` for a missing or damaged model, or one of no known family.
        """
        known = list(signature(open_source).parameters)[1:]
        for key in options:
            if key not in known:
                raise unknown("keyword", key, known)
        if isinstance(name, Source) and options:
            raise VisarError(f"A Source has its options; give {next(iter(options))} to `open_source`.")
        source = name if isinstance(name, Source) else open_source(name, **options)
        family = family_of(source).load(source)
        check_condition(source.name, family.condition, source.condition)
        return cls(family, source.folder)

    @staticmethod
    def of(model: Any) -> ImageModel:
        """The model of a pipeline, or the model itself. Raises `VisarError` for other objects."""
        found = getattr(model, "image_model", model)
        if not isinstance(found, ImageModel):
            raise VisarError(f"Give a pipeline or an ImageModel, not a {type(model).__name__}.")
        return found

    # Properties

    @property
    def device(self) -> torch.device:
        return self.family.device

    @property
    def dtype(self) -> torch.dtype:
        return self.family.dtype

    @property
    def samplers(self) -> Mapping[str, SamplerSpec]:
        """The samplers for its kind of tokens and their order."""
        return samplers_for(self.family.tokens, self.family.scan)

    def usable_samplers(self) -> list[str]:
        """Names of the samplers that need no drafter, or one that the model has."""
        return [n for n, spec in self.samplers.items() if not spec.drafter or self.drafters.has(spec.drafter)]

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert all components, to a device, a dtype, or both: `to("cuda", dtype=torch.bfloat16)`.

        Raises `VisarError` as `visar.devices.placement` does.
        """
        given = dict(zip(("device", "dtype"), placement(*args, **kwargs), strict=True))
        self.family.to(**{name: value for name, value in given.items() if value is not None})
        self.drafters.to()
        return self

    def sized(self, height: int | None = None, width: int | None = None) -> ImageModel:
        """The model for images of another size in pixels, with this one's weights. Raises `VisarError` for one that it
        does not make."""
        family = self.family.sized(height, width)
        if family is self.family:
            return self
        other = copy.copy(self)
        other.family = family
        return other

    def quantize(self, weights: str) -> None:
        """Round the weights to "int8" or "fp8", on the device where they will be used; "native" leaves them.

        The result is another model, and samplers are exact for that one: `docs/quantization.md` has quality and speed.
        It cannot be saved, trained or rounded again. Raises `VisarError` if the model or device does not support it.
        """
        self.family.quantize(weights)

    def load_drafter(self, path: str | Path) -> None:
        """Give the model a drafter for the samplers that need one. Raises `VisarError` for one that does not fit."""
        self.drafters.load(path)

    # Calls

    def sampler_of(self, sampler: Any = None, window: int | None = None) -> Any:
        """A sampler fitted to this model's images. Raises `VisarError` if it cannot decode them.

        `sampler` is a name, FILE.py:NAME, an object, or None for the default; `window` replaces its own.
        """
        tokens, scan = self.family.tokens, self.family.scan
        method = get_sampler(default_sampler(tokens, scan) if sampler is None else sampler, window=window)
        check_sampler(method, tokens, scan)
        return self.fitted(method, default=sampler is None)

    def fitted(self, sampler: Any, default: bool = False, free: int | None = None) -> Any:
        """The sampler with this model's `layout`, if it has one; a default one with at most as many passes as tokens to
        sample (`free`)."""
        names, layout = getattr(sampler, "__dataclass_fields__", {}), self.family.layout
        if "layout" in names:
            sampler = replace(sampler, layout=layout)
        if default and "steps" in names:
            sampler = replace(sampler, steps=min(sampler.steps, layout.length if free is None else free))
        return sampler

    def params_of(self, params: SamplingParams | None = None, **settings: Any) -> SamplingParams:
        """The settings of a call, with this model's defaults. Raises `VisarError` for one that it does not have."""
        asked = SamplingParams.of(params, **settings)
        asked.check(self.family.tokens, self.family.scan)
        return asked.resolved(self.family.defaults)

    def generate(
        self,
        conditions: Any,
        params: SamplingParams | None = None,
        *,
        sampler: Any = None,
        window: int | None = None,
        num_images: int = 1,
        first_image: int | Sequence[int] = 0,
        output_type: str = "pil",
        callback: StepCallback | None = None,
        **settings: Any,
    ) -> ImageOutput:
        """Decode `num_images` images for each prompt or class id, condition by condition.

        `params`, or the same names as keywords (`visar.SamplingParams`), say how; `sampler` is a name of
        `visar samplers`, FILE.py:NAME, or an object, and `window` replaces its W. The same seed and condition give the
        same image in any batch: a condition's images have the indices `first_image`, `first_image` + 1, ..., or one for
        each image, so that a large set can be made in parts. `callback` gets a `Progress` after every pass. Raises
        `VisarError` for values that are out of range or unknown.
        """
        checked_output(output_type)
        if callback is not None:
            check_callback("callback", callback, ("progress",))
        params = self.params_of(params, **settings)
        values = self._checked(listed(conditions))
        if (num_images := of_64_bits("The number of images", num_images) or 0) < 1:
            raise VisarError(f"The number of images must be 1 or more, not {num_images}.")
        each = self.family.bytes_per_image(1, False) or LEAST  # at least; the session knows what its passes need
        if output_type not in ("tokens", "latent"):
            self.family.check_decoding()
            height, width = self.family.pixels
            each = 4 * 3 * height * width * COPIES
        check_memory(each, len(values) * num_images, self.device)  # before anything is made for each image
        keys: list[Hashable] = [value for value in values for _ in range(num_images)]
        self.check_modules()
        with steady_weights(), undisturbed(self.device), torch.inference_mode(), self.invariant(params):
            encoded = tuple(part.repeat_interleave(num_images, 0) for part in self._encoded(values, params))
            for part in encoded:
                require_finite(part, f"The features of the {self.family.condition}", part.dtype)
            for note in self.family.notes(values):
                warnings.warn(note, NotInTraining, stacklevel=2)
            noise = noise_of(keys, first_image, params.seed if params.seed is not None else 0, self.device)
            result, stats = RUN[self.family.tokens](self, encoded, noise, params, sampler, window, callback)
        with ordinary():
            tokens, commit_pass = result.tokens.clone(), result.commit_pass.clone()
            images = as_output(lambda: self.decode_tokens(tokens, keys), tokens, output_type)
        return ImageOutput(images=images, tokens=tokens, commit_pass=commit_pass, stats=stats)

    __call__ = generate

    def decode_tokens(self, tokens: Tensor, conditions: Sequence[Any] | None = None) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], fp32, for tokens [B, N], of continuous models [B, N, d].

        They are decoded one by one, since convolutions round otherwise in another batch. The images' `conditions`, if
        given, are for decoders that take prompts too. Raises `VisarError` for tokens of another shape or kind, ids that
        no image has, or pixels that are not finite.
        """
        family, wanted = self.family, [self.family.layout.length, *self.family.token_shape]
        if not isinstance(tokens, Tensor) or not has_values(tokens) or [*tokens.shape[1:]] != wanted:
            shape = f"a {type(tokens).__name__}"
            if isinstance(tokens, Tensor):
                shape = str(list(tokens.shape)) if has_values(tokens) else "one without values or with another layout"
            raise VisarError(f"tokens must be a tensor [B, {', '.join(map(str, wanted))}], not {shape}.")
        has_ids = family.tokens == DISCRETE
        if tokens.dtype not in (WHOLE if has_ids else COMPUTED):
            kind = "whole" if has_ids else "floating-point"
            raise VisarError(f"tokens must be a tensor of {kind} numbers, not {tokens.dtype}.")
        conditions = None if conditions is None else self._checked(listed(conditions))
        if conditions is not None and len(conditions) != len(tokens):
            raise VisarError(f"There are {len(conditions)} conditions for {len(tokens)} images; give one for each.")
        with ordinary(), undisturbed(self.device):
            if has_ids:
                tokens = tokens.long()
                if len(bad := discrete.misplaced(cast(DiscreteFamily, family), tokens)):
                    raise VisarError(
                        f"tokens has an id that is no image token, such as {int(bad[0])}, at its position."
                    )
            if not len(tokens):
                return torch.empty(0, 3, *family.pixels)
            try:
                parts = tokens.split(1)
                if conditions is None:
                    pixels = torch.cat([family.decode(one) for one in parts])
                else:
                    each = zip(conditions, parts, strict=True)
                    pixels = torch.cat([family.decode_for([value], one) for value, one in each])
            except IndexError as error:
                raise VisarError(f"tokens has an id that is no image token, such as {int(tokens.max())}.") from error
            require_finite(pixels, "The decoder's pixels", self.dtype)
        return pixels

    def invariant(self, params: SamplingParams) -> AbstractContextManager[None]:
        """The invariant mode, where it is asked for. Raises `VisarError` where there is none."""
        if params.invariant and self.device.type == "cuda" and triton is None:
            raise VisarError("The invariant mode on a GPU needs Triton, which is not installed.")
        return invariant(bool(params.invariant))

    def _encoded(self, values: list[Any], params: SamplingParams) -> Encoded:
        """The encoded conditions; in the invariant mode one at a time, as text encoders know nothing of it."""
        if not params.invariant:
            return self.family.encode(values)
        every = [self.family.widened(self.family.encode([value])) for value in values]
        return tuple(torch.cat(parts) for parts in zip(*every, strict=True))

    def _checked(self, values: list[Any]) -> list[Any]:
        """Conditions that the family takes; class ids may be NumPy's or 0-d tensors."""
        if self.family.condition == "class":
            try:
                values = [v if isinstance(v, str) else class_id(v) for v in values]
            except TypeError as error:
                raise VisarError(f"Classes are whole numbers, not {error}.") from error
        self.family.check_conditions(values)
        return values

    def check_modules(self) -> None:
        """Raise `VisarError` for wrappers and patches that have no effect on decoding, and for weights that are not
        finite, which attention or an unused row of a table can hide from the images."""
        for name, component in self.family.components.items():
            check_unwrapped(name, component)
            check_one_dtype(name, component)
            check_filled(name, component)
            if isinstance(component, nn.Module) and name != "text_encoder":  # whose features are checked instead
                require_finite_weights(component, repr(name))
        self.family.check_layers()

    def run(
        self,
        session: Any,
        method: Any,
        target: Any,
        noise: Any,
        callback: StepCallback | None,
        given: Tensor | None = None,
        every: int | None = None,
        graph: Graph | None = None,
    ) -> Decoded:
        """Run the sampler with a progress bar; `given` [N] marks tokens that no pass commits."""

        def tell(now: Snapshot) -> None:
            bar.update(int(now.lengths.sum()) - bar.n)
            if callback is not None:
                callback(Progress.of(now, given, self.family))

        quiet = self.bar.get("disable", False)
        with tqdm(**{"total": session.batch * session.length, "unit": "token", **self.bar}) as bar:
            done = decode(session, method, target, noise, None if quiet and callback is None else tell, every, graph)
            bar.update(bar.total - bar.n)  # there may be no callback after the last passes
            return done

    @property
    def row_graphs(self) -> RowGraphs | None:
        """CUDA graphs of a diffusion head, cached between calls; None on other devices."""
        if self._row_graphs is None and self.device.type == "cuda":
            self._row_graphs = RowGraphs()
        return self._row_graphs

    def settings_of(self, params: SamplingParams) -> dict[str, Any]:
        """The settings of a call for its stats."""
        settings = {name: value for name, value in params.to_dict().items() if value is not None and name != "seed"}
        settings["dtype"] = str(self.dtype).removeprefix("torch.")
        if (precision := torch.get_float32_matmul_precision()) != "highest":
            settings["float32_matmul_precision"] = precision  # TF32 or bfloat16 within products: another target model
        if self.family.tokens == DISCRETE:
            settings["weights"] = self.family.weights  # 8-bit weights are another target model
            settings["invariant"] = bool(params.invariant)
        return settings | {"device": str(self.device)}


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Disable a caller's autocast, default dtype and default device, which would change the sampled distribution."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    elsewhere = torch.get_default_device().type != "cpu"
    try:
        with torch.autocast(device.type, enabled=False), torch.device("cpu") if elsewhere else nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


def class_id(value: Any) -> int:
    """The class of an int, NumPy's or a 0-d tensor. Raises `TypeError` for anything else, and for truth values."""
    value = plain(value)
    if isinstance(value, bool):
        raise TypeError(repr(value))
    try:
        return index(value)
    except TypeError as error:
        raise TypeError(repr(value)) from error


@contextmanager
def ordinary() -> Iterator[None]:
    """For tensors that callers get: without gradients, and never inference tensors, also in a caller's mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield
